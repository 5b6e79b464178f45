package virtnbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/pierrec/lz4/v4"

	"qmchain/chain/qcow2"
)

// FuzzPack makes an LZ4 frame of blocks with any bytes in them, with sums that fit, and compares with the library's own reader of frames.
// The blocks are cut from script, each behind two bytes with its length, whose highest bit says that it is not compressed.
func FuzzPack(f *testing.F) {
	rnd := rand.New(rand.NewPCG(5, 5))
	data := make([]byte, 1024)
	for i := range data {
		data[i] = byte(rnd.IntN(3))
	}
	script := func(blocks ...[]byte) (b []byte) {
		for _, block := range blocks {
			packed := make([]byte, lz4.CompressBlockBound(len(block)))
			n, err := lz4.CompressBlock(block, packed, nil)
			if err != nil || n == 0 {
				f.Fatal(n, err)
			}
			b = append(binary.LittleEndian.AppendUint16(b, uint16(n)), packed[:n]...)
		}
		return b
	}
	stored := append(binary.LittleEndian.AppendUint16(nil, 512|1<<15), data[:512]...)
	f.Add(script(data), byte(flagIndep), uint16(2))
	f.Add(script(data), byte(flagBlockSums), uint16(2))
	f.Add(stored, byte(flagIndep|flagContent), uint16(1))
	// 64 KiB, and then what refers to it.
	f.Add(append(script(bytes.Repeat(data, 64)), 9, 0, 0x1f, 1, 1, 255, 2, 0x50, 1, 2, 3, 4, 5), byte(0), uint16(129))
	f.Add([]byte{1, 0, 0}, byte(0), uint16(1))
	f.Fuzz(func(t *testing.T, script []byte, flags byte, sectors uint16) {
		flags &= flagIndep | flagBlockSums | flagContent
		length := max(int64(sectors), 1) * sectorLen
		pack := binary.LittleEndian.AppendUint32(nil, lz4Magic)
		pack = append(pack, 1<<6|flags, 4<<4)
		if flags&flagContent != 0 {
			pack = binary.LittleEndian.AppendUint64(pack, uint64(length))
		}
		pack = append(pack, byte(xxh32(pack[4:])>>8))
		blocks := 0
		for ; len(script) > 2; blocks++ {
			head := binary.LittleEndian.Uint16(script)
			n := min(max(int(head&0x7fff), 1), len(script)-2)
			block := script[2 : 2+n]
			script = script[2+n:]
			pack = binary.LittleEndian.AppendUint32(pack, uint32(n)|uint32(head>>15)<<31)
			pack = append(pack, block...)
			if flags&flagBlockSums != 0 {
				pack = binary.LittleEndian.AppendUint32(pack, xxh32(block))
			}
		}
		pack = append(pack, 0, 0, 0, 0)

		got, err := unpack(pack, length)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("unexpected kind of error: %v", err)
		}
		want, wantErr := io.ReadAll(io.LimitReader(lz4.NewReader(bytes.NewReader(pack)), length+1))
		if err == nil && (wantErr != nil || !bytes.Equal(got, want)) {
			t.Fatalf("other content: %d bytes of %d, %v", len(want), length, wantErr)
		}
		// The library takes empty blocks too, behind what there should be, and full ones of any size.
		if err != nil && wantErr == nil && int64(len(want)) == length && blocks == 1 {
			t.Fatalf("it is good: %v", err)
		}
	})
}

// unpack reads a pack as the one frame of a stream of a disk of that length.
func unpack(pack []byte, length int64) ([]byte, error) {
	var file bytes.Buffer
	meta := fmt.Sprintf(`{"virtualSize": %d, "dataSize": %[1]d, "date": "2026-11-20T11:17:13", "compressed": 2, "compressionMethod": "lz4", "streamVersion": 2}`, length)
	fmt.Fprintf(&file, "meta %016x %016x\r\n%s\r\n", 0, len(meta), meta)
	fmt.Fprintf(&file, "data %016x %016x\r\n%s\r\n", 0, length, pack)
	sizes := fmt.Sprintf("[%d]", len(pack))
	fmt.Fprintf(&file, "stop %016x %016x\r\n%s\r\ncomp %016x %016x\r\n", 0, 0, sizes, 0, len(sizes))
	r := bytes.NewReader(file.Bytes())
	s, err := Open(r, r.Size())
	if err != nil {
		return nil, fmt.Errorf("the stream: %v", err) //nolint:errorlint // that is no finding about the pack
	}
	runs, err := s.Map(0, s.Span(), nil)
	if err != nil || len(runs) != 1 || runs[0].Kind != qcow2.Compressed {
		return nil, fmt.Errorf("%+v, %v", runs, err) //nolint:errorlint // the same
	}
	var d Decoder
	var out []byte
	var from *Restart
	for n := int64(0); n*PieceSize < length; n++ {
		p, err := d.Piece(s, runs[0], n, from)
		if err != nil {
			return nil, err
		}
		out, from = append(out, p.Data...), p.Restart()
	}
	return out, nil
}
