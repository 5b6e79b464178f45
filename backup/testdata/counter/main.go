// Counter writes an ever larger number to two disks in turn, the second one first, each time through to the disk. At any
// instant the second disk's number is that of the first or one more.
package main

import (
	"encoding/binary"
	"os"
	"syscall"
	"unsafe"
)

const blockSize = 4096

func main() {
	first, second := open(os.Args[1]), open(os.Args[2])
	// O_DIRECT wants aligned memory.
	memory := make([]byte, 2*blockSize)
	block := memory[blockSize-int(uintptr(unsafe.Pointer(&memory[0]))%blockSize):][:blockSize]
	for n := uint64(1); ; n++ {
		binary.LittleEndian.PutUint64(block, n)
		write(second, block)
		write(first, block)
	}
}

func open(path string) *os.File {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT|syscall.O_SYNC, 0)
	if err != nil {
		panic(err)
	}
	return f
}

func write(f *os.File, block []byte) {
	if _, err := f.WriteAt(block, 0); err != nil {
		panic(err)
	}
}
