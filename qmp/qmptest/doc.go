// Package qmptest helps to test what speaks QMP.
//
//   - [Fake] is a QMP server without a QEMU behind it: handlers answer the commands, and faults make it
//     fail, hang or cut the connection at a chosen command.
//   - [Proxy] stands between a client and a real QEMU, and stops at every command, so that a test can
//     write to the guest's disk there, kill the client, or cut the connection.
//   - [QEMU] is a real QEMU that lives as long as the test.
//
// All of them work in folders of their own and end with the test.
package qmptest

import (
	"os"
	"testing"
)

// socketDir makes a folder for sockets. t.TempDir would put the test's name into the path, and a unix
// socket's path can't be longer than 107 bytes.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
