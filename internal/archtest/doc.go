// Package archtest keeps the shape of the project: its tests fail when a
// package imports one that it must not know, ends the process on its own, or
// does not say what it is for.
//
// The rules are one table, in rules_test.go.
package archtest
