// Package streamtest makes stream files as virtnbdbackup does, and reads them in the
// simplest way that there is, for tests to compare with.
package streamtest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/adler32"
	"io"
	"strings"

	"github.com/pierrec/lz4/v4"
)

// Stream is what a stream file is made of.
type Stream struct {
	Size       int64 // of the disk
	Disk       string
	Checkpoint string
	Parent     string // of an increment; "" is a full
	Date       string // 2026-11-20T11:17:13.824072 by default
	Compress   bool
	// Limit is how much of a data frame is compressed as one; 32 MiB by default.
	Limit int
	// Indep compresses each block for itself, which virtnbdbackup does not if there are
	// several.
	Indep  bool
	Frames []Frame // of a full those with zeroes can be left out
}

// Frame is a data frame, or a zero frame without Data.
type Frame struct {
	Off  int64
	Len  int64 // of a zero frame
	Data []byte
}

// Bytes is the stream's file.
func (s Stream) Bytes() []byte {
	incremental := s.Parent != ""
	var data int64
	frames := s.Frames
	if !incremental {
		frames = s.covering()
	}
	for _, f := range frames {
		data += int64(len(f.Data))
	}
	or := func(s, other string) string {
		if s == "" {
			return other
		}
		return s
	}
	var level any = false
	if s.Compress {
		level = 2
	}
	meta, err := json.MarshalIndent(map[string]any{
		"virtualSize": s.Size, "dataSize": data, "date": or(s.Date, "2026-11-20T11:17:13.824072"), "diskName": or(s.Disk, "vda"),
		"diskFormat": "qcow2", "checkpointName": or(s.Checkpoint, "virtnbdbackup.0"), "compressed": level, "compressionMethod": "lz4",
		"parentCheckpoint": s.Parent, "incremental": incremental, "streamVersion": 2,
	}, "", "    ")
	if err != nil {
		panic(err) // only of maps that can't be encoded
	}
	var out bytes.Buffer
	header := func(kind string, off, length int64) { fmt.Fprintf(&out, "%s %016x %016x\r\n", kind, off, length) }
	header("meta", 0, int64(len(meta)))
	out.Write(append(meta, "\r\n"...))
	var sizes []string
	for _, f := range frames {
		if f.Data == nil {
			header("zero", f.Off, f.Len)
			continue
		}
		header("data", f.Off, int64(len(f.Data)))
		if s.Compress {
			packs, size := s.compress(f.Data)
			out.Write(packs)
			sizes = append(sizes, size)
		} else {
			out.Write(f.Data)
		}
		out.WriteString("\r\n")
	}
	header("stop", 0, 0)
	if s.Compress {
		list := "[" + strings.Join(sizes, ", ") + "]"
		out.WriteString(list + "\r\n")
		header("comp", 0, int64(len(list)))
	}
	return out.Bytes()
}

// Sum is what virtnbdbackup 2.x writes beside a file with these bytes.
func Sum(file []byte) []byte { return fmt.Append(nil, adler32.Checksum(file)) }

// covering adds the zero frames of a full.
func (s Stream) covering() []Frame {
	var frames []Frame
	var at int64
	for _, f := range s.Frames {
		if f.Off > at {
			frames = append(frames, Frame{Off: at, Len: f.Off - at})
		}
		frames = append(frames, f)
		at = f.Off + int64(len(f.Data)) + f.Len
	}
	if at < s.Size {
		frames = append(frames, Frame{Off: at, Len: s.Size - at})
	}
	return frames
}

// compress makes a data frame's packs and their entry in the list of sizes.
func (s Stream) compress(data []byte) (packs []byte, size string) {
	limit := s.Limit
	if limit == 0 {
		limit = 32 << 20
	}
	var sizes []string
	for len(data) > 0 {
		n := min(limit, len(data))
		p := Pack(data[:n], s.Indep)
		packs, data = append(packs, p...), data[n:]
		sizes = append(sizes, fmt.Sprint(len(p)))
	}
	if len(sizes) == 1 {
		return packs, sizes[0]
	}
	return packs, fmt.Sprintf(`{"%d": [%s]}`, len(packs), strings.Join(sizes, ", "))
}

const blockMax = 64 << 10

// Pack compresses data to an LZ4 frame, with the flags that virtnbdbackup uses. The
// check sums are those of the lz4 library, which writes each frame's skeleton.
func Pack(data []byte, indep bool) []byte {
	out := skeleton(data)
	if indep || len(data) <= blockMax {
		return out
	}
	// Blocks that refer to those before them: the library can't make them.
	head := out[:15]
	head[4] &^= 1 << 5
	head[14] = byte(xxh32(head[4:14]) >> 8)
	end := out[len(out)-8:] // mark, and the sum of all
	linked := bytes.Clone(head)
	var seen table
	for at := 0; at < len(data); at += blockMax {
		b := block(data, at, min(at+blockMax, len(data)), &seen)
		linked = binary.LittleEndian.AppendUint32(linked, uint32(len(b)))
		linked = append(linked, b...)
		linked = binary.LittleEndian.AppendUint32(linked, xxh32(b))
	}
	return append(linked, end...)
}

func skeleton(data []byte) []byte {
	var out bytes.Buffer
	w := lz4.NewWriter(&out)
	err := w.Apply(lz4.BlockSizeOption(lz4.Block64Kb), lz4.BlockChecksumOption(true), lz4.ChecksumOption(true), lz4.SizeOption(uint64(len(data))))
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		panic(err) // writing to memory
	}
	return out.Bytes()
}

// xxh32 is the sum that the lz4 library puts behind the frame of b.
func xxh32(b []byte) uint32 {
	frame := skeleton(b)
	return binary.LittleEndian.Uint32(frame[len(frame)-4:])
}

// table has where 4 bytes of a hash were seen last, plus 1.
type table [1 << 14]int

// block compresses data[from:to], with matches in the 64 KiB before.
func block(data []byte, from, to int, seen *table) []byte {
	var out []byte
	length := func(n int) {
		for n -= 15; n >= 255; n -= 255 {
			out = append(out, 255)
		}
		out = append(out, byte(n))
	}
	sequence := func(literals []byte, offset, match int) {
		token := byte(min(len(literals), 15)) << 4
		if match > 0 {
			token |= byte(min(match-4, 15))
		}
		out = append(out, token)
		if len(literals) >= 15 {
			length(len(literals))
		}
		out = append(out, literals...)
		if match > 0 {
			out = append(out, byte(offset), byte(offset>>8))
			if match-4 >= 15 {
				length(match - 4)
			}
		}
	}
	anchor := from
	for i := from; i < to-12; {
		word := binary.LittleEndian.Uint32(data[i:])
		slot := &seen[word*2654435761>>18]
		at := *slot - 1
		*slot = i + 1
		if at < 0 || i-at > 65535 || binary.LittleEndian.Uint32(data[at:]) != word {
			i++
			continue
		}
		n := 4
		for i+n < to-5 && data[at+n] == data[i+n] {
			n++
		}
		sequence(data[anchor:i], i-at, n)
		i += n
		anchor = i
	}
	sequence(data[anchor:to], 0, 0)
	return out
}

// Apply does to disk what a stream file says, frame by frame, as a restore does; a disk
// of another size is first made one of that of the stream. It trusts the file.
func Apply(disk, file []byte) ([]byte, error) {
	var meta struct {
		VirtualSize int  `json:"virtualSize"`
		Compressed  any  `json:"compressed"`
		Incremental bool `json:"incremental"`
	}
	in := bytes.NewReader(file)
	var payload []byte
	for {
		line := make([]byte, 40)
		if _, err := io.ReadFull(in, line); err != nil {
			return nil, err
		}
		var kind string
		var off, length int64
		if _, err := fmt.Sscanf(string(line), "%s %x %x\r\n", &kind, &off, &length); err != nil {
			return nil, err
		}
		switch kind {
		case "meta":
			text := make([]byte, length)
			if _, err := io.ReadFull(in, text); err != nil {
				return nil, err
			}
			if err := json.Unmarshal(text, &meta); err != nil {
				return nil, err
			}
			disk = append(bytes.Clone(disk[:min(len(disk), meta.VirtualSize)]), make([]byte, max(0, meta.VirtualSize-len(disk)))...)
		case "zero":
			clear(disk[off : off+length])
			continue
		case "data":
			payload = disk[off : off+length]
			if meta.Compressed == nil || meta.Compressed == false {
				if _, err := io.ReadFull(in, payload); err != nil {
					return nil, err
				}
				break
			}
			for len(payload) > 0 {
				n, err := unpack(in, payload)
				if err != nil {
					return nil, err
				}
				payload = payload[n:]
			}
		case "stop":
			return disk, nil
		}
		end := make([]byte, 2)
		if _, err := io.ReadFull(in, end); err != nil || string(end) != "\r\n" {
			return nil, errors.New("no end of a frame")
		}
	}
}

// unpack reads one LZ4 frame and no byte more. The library's reader takes all that
// follows for more frames, so it is given as much as the frame's own sizes say.
func unpack(in *bytes.Reader, to []byte) (int, error) {
	start, _ := in.Seek(0, io.SeekCurrent)
	head := make([]byte, 15)
	if _, err := io.ReadFull(in, head); err != nil {
		return 0, err
	}
	for {
		var size uint32
		if err := binary.Read(in, binary.LittleEndian, &size); err != nil {
			return 0, err
		}
		if size == 0 {
			break
		}
		if _, err := in.Seek(int64(size&^(1<<31))+4, io.SeekCurrent); err != nil {
			return 0, err
		}
	}
	end, _ := in.Seek(4, io.SeekCurrent)
	n, err := io.ReadFull(lz4.NewReader(io.NewSectionReader(in, start, end-start)), to)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil // the next frame has the rest
	}
	return n, err
}
