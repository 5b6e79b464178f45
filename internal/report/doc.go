// Package report says in one page how all backups of a set are: what points there are, what they hang on, how large they
// are, when the last one was made, and when one was last verified and drilled.
//
// The words:
//
//   - report: what was found when the set was looked at, once. Manifests are read, and of a repository it is seen whether each
//     image is there and of the right size; no data is read, which is what verify is for.
//   - remark: something that whoever looks after the backups should know. What is bad needs them; a warning may.
//   - picture: a guest's points as nodes along a line, oldest first, with what they were made on and how much each stores.
//   - place: where something stands in the picture. It is one point, or a group of older ones that nothing sets apart: the
//     page is bounded, however many points there are.
//
// A report is gathered from a set (Look), and is then plain data, which is the program's JSON. Page makes HTML of it: one file
// that needs nothing else. It has no script, and a content security policy that forbids to load anything, so that what a
// guest's name or note holds can't either.
package report
