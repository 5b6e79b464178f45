// Writer writes blocks at random offsets of a disk at a fixed rate, past the page cache, and prints how long the writes
// took. Usage: writer DEVICE LENGTH RATE, such as writer /dev/disk/scsi0 10s 100.
//
// The time of each write counts from when it was due, not from when it began: a disk that stalls makes all writes late that
// were due meanwhile, and a loop that awaited each write would hide that by not writing.
package main

import (
	"encoding/json"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

const (
	blockSize = 4096
	// writers is how many writes can be under way. It is far below the depth of a virtual disk's queue.
	writers = 32
)

func main() {
	f, err := os.OpenFile(os.Args[1], os.O_RDWR|syscall.O_DIRECT, 0)
	check(err)
	size, err := f.Seek(0, io.SeekEnd)
	check(err)
	length, err := time.ParseDuration(os.Args[2])
	check(err)
	rate, err := strconv.Atoi(os.Args[3])
	check(err)

	took := make([]time.Duration, int(length.Seconds()*float64(rate)))
	var next atomic.Int64
	var group sync.WaitGroup
	start := time.Now()
	for range writers {
		group.Go(func() {
			block := aligned()
			for {
				i := int(next.Add(1)) - 1
				if i >= len(took) {
					return
				}
				due := start.Add(time.Duration(i) * time.Second / time.Duration(rate))
				time.Sleep(time.Until(due))
				_, err := f.WriteAt(block, rand.Int64N(size/blockSize)*blockSize)
				check(err)
				took[i] = time.Since(due)
			}
		})
	}
	group.Wait()

	slices.Sort(took)
	at := func(percent int) float64 {
		return float64(took[min(len(took)*percent/100, len(took)-1)].Microseconds()) / 1000
	}
	check(json.NewEncoder(os.Stdout).Encode(map[string]any{
		"writes": len(took), "p50_ms": at(50), "p95_ms": at(95), "p99_ms": at(99), "max_ms": at(100),
	}))
}

// aligned is memory as O_DIRECT wants it, with something in it that QEMU does not take for zeroes.
func aligned() []byte {
	memory := make([]byte, 2*blockSize)
	block := memory[blockSize-int(uintptr(unsafe.Pointer(&memory[0]))%blockSize):][:blockSize]
	for i := range block {
		block[i] = byte(i) | 1
	}
	return block
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
