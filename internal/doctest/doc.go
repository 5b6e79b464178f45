// Package doctest keeps the documents true: README.md, SECURITY.md, the guides in packaging/doc and the manual page qmchain(7).
//
// Words:
//
//   - A document is a file of text with blocks of commands and examples in it. The text is the source: what it says is what
//     is run.
//   - A block in Markdown has the language sh (commands), toml (a settings file, named in its first line), text (what is
//     seen) or fstab. In the manual page a block stands between .nf and .fi, and its commands begin with a prompt.
//   - A scenario is what a document's reader has: machines with data on them, and, before a section, what has happened to
//     them. It says what must be true after a section, but not what is done in it.
//   - A sandbox is a machine on which a document is run from top to bottom: this one, with all that is written to it thrown
//     away, name spaces of its own, the programs as just built, and package pvetest's Proxmox VE where PVE is.
//
// A command that can't be run there, such as the installation of the package, must stand in the script that does run it
// (the table elsewhere). Texts of errors must be in the programs, tests that a claim names must be there, and so must
// what is linked to.
//
// There is nothing but tests here.
package doctest
