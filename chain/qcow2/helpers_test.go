package qcow2_test

import (
	"os/exec"
	"regexp"
	"testing"
)

// command runs a command that may fail.
func command(t testing.TB, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	return string(out), err
}

func matches(pattern string, err error) bool {
	return regexp.MustCompile(pattern).MatchString(err.Error())
}
