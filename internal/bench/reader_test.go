package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// readerJob makes the test binary a reader, which does this job.
const readerJob = "QMCHAIN_BENCH_READ"

// A job for a reader: to read files as one long sequence of bytes. Readers are processes of their own, so that what they
// take of the processors can be told from what the server of a mount takes, and so that Go's scheduler, which can't know
// which of the benchmark's system calls will wait, has nothing else to do.
type job struct {
	Files   []string
	Workers int           // reads under way at a time
	Block   int64         // bytes
	Random  bool          // or from the first byte to the last; no block is read twice before all were read, where there are not too many
	Seed    uint64        // of Random
	For     time.Duration // of Random
	Keep    bool          // what the kernel has of the files; otherwise it is dropped before
}

// done is what came of a job.
type done struct {
	Bytes   int64
	Reads   int64
	Seconds float64
	CPU     float64 // seconds of the reader's own
}

// read does a job.
func (j job) read(b *testing.B) done {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	text, err := json.Marshal(j)
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.CommandContext(b.Context(), self)
	// Each worker can be in a system call without another one waiting for its place.
	cmd.Env = append(os.Environ(), readerJob+"="+string(text), fmt.Sprint("GOMAXPROCS=", j.Workers+2))
	var failed strings.Builder
	cmd.Stderr = &failed
	out, err := cmd.Output()
	if err != nil {
		b.Fatalf("reader: %v: %s", err, failed.String())
	}
	var d done
	if err := json.Unmarshal(out, &d); err != nil {
		b.Fatal(err)
	}
	return d
}

// serveReads does the job that text describes.
func serveReads(text string, out io.Writer) error {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return err
	}
	d, err := j.do()
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(d)
}

// part is a file of a job.
type part struct {
	fd         int
	start, end int64 // of the sequence of bytes
}

func (j job) open() (parts []part, size int64, err error) {
	for _, name := range j.Files {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, 0, fmt.Errorf("%s: %w", name, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return nil, 0, err
		}
		if !j.Keep {
			if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
				return nil, 0, err
			}
		}
		n := st.Size &^ (j.Block - 1)
		if !j.Random {
			n = st.Size
		}
		parts = append(parts, part{fd, size, size + n})
		size += n
	}
	return parts, size, nil
}

func (j job) do() (done, error) {
	parts, size, err := j.open()
	if err != nil {
		return done{}, err
	}
	if size == 0 {
		return done{}, errors.New("nothing to read")
	}
	var next atomic.Int64
	order := j.order(size) // before the clock runs
	results := make([]done, j.Workers)
	errs := make([]error, j.Workers)
	var workers sync.WaitGroup
	began, used := time.Now(), ownCPU()
	for i := range j.Workers {
		workers.Go(func() {
			buf, err := unix.Mmap(-1, 0, int(j.Block), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
			if err != nil {
				errs[i] = err
				return
			}
			if j.Random {
				at := func() int64 { return order(next.Add(1)-1) * j.Block }
				results[i], errs[i] = j.random(parts, buf, at, began.Add(j.For))
			} else {
				results[i], errs[i] = j.sequential(parts, buf)
			}
		})
	}
	workers.Wait()
	sum := done{Seconds: time.Since(began).Seconds()}
	for _, r := range results {
		sum.Bytes += r.Bytes
		sum.Reads += r.Reads
	}
	sum.CPU = ownCPU() - used
	return sum, errors.Join(errs...)
}

func (j job) sequential(parts []part, buf []byte) (d done, err error) {
	for _, p := range parts {
		for at := p.start; at < p.end; {
			n, err := unix.Pread(p.fd, buf, at-p.start)
			if err != nil {
				return d, err
			}
			if n == 0 {
				return d, io.ErrUnexpectedEOF
			}
			d.Bytes, d.Reads, at = d.Bytes+int64(n), d.Reads+1, at+int64(n)
		}
	}
	return d, nil
}

// maxOrder bounds the memory of an order, in blocks: 16 GiB of 4 KiB. In more blocks hardly one comes twice.
const maxOrder = 4 << 20

// order says which block is read as the nth one; the same for all with the same seed. A block that comes again would be in the
// kernel's cache, more often the faster one reads.
func (j job) order(size int64) func(n int64) int64 {
	blocks := size / j.Block
	rnd := rand.New(rand.NewPCG(j.Seed, 0))
	switch {
	case !j.Random:
		return nil
	case blocks <= maxOrder:
		order := rnd.Perm(int(blocks))
		return func(n int64) int64 { return int64(order[n%blocks]) }
	}
	var m sync.Mutex
	return func(int64) int64 {
		m.Lock()
		defer m.Unlock()
		return rnd.Int64N(blocks)
	}
}

func (j job) random(parts []part, buf []byte, next func() int64, until time.Time) (d done, err error) {
	for d.Reads%16 != 0 || time.Now().Before(until) {
		at := next()
		i := 0
		for parts[i].end <= at {
			i++
		}
		n, err := unix.Pread(parts[i].fd, buf, at-parts[i].start)
		if err != nil {
			return d, err
		}
		if n != len(buf) {
			return d, io.ErrUnexpectedEOF
		}
		d.Bytes, d.Reads = d.Bytes+int64(n), d.Reads+1
	}
	return d, nil
}

// ownCPU is what this process took of the processors so far, in seconds.
func ownCPU() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err) // only ever says that an argument is wrong
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}
