package testenv

import (
	"os"
	"syscall"
)

// WriteProgram writes a script that can be started at once. What is open for writing can't be started, and a child that another
// test is just making has for a moment all the files that are open here: so none is made meanwhile.
func WriteProgram(path, text string) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, []byte(text), 0o700)
}
