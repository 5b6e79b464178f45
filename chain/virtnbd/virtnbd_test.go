package virtnbd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/qcow2"
	"qmchain/chain/virtnbd"
	"qmchain/chain/virtnbd/streamtest"
)

// read reads the whole disk of a stream that lies on parent.
func read(parent, file []byte) ([]byte, error) {
	r := bytes.NewReader(file)
	s, err := virtnbd.Open(r, int64(len(file)))
	if err != nil {
		return nil, err
	}
	if s.Size() > 128<<20 {
		return nil, fmt.Errorf("a disk of %d bytes is too large to compare", s.Size())
	}
	disk := make([]byte, s.Size())
	if s.Meta().Incremental {
		copy(disk, parent)
	}
	var d virtnbd.Decoder
	var last int64
	for off := int64(0); off < s.Size(); off += s.Span() {
		runs, err := s.Map(off, s.Span(), nil)
		if err != nil {
			return nil, err
		}
		if len(runs) > 0 && runs[0].Off >= off && s.Next(off) > runs[0].Off {
			return nil, fmt.Errorf("the next run behind %d is at %d, not %d", off, runs[0].Off, s.Next(off))
		}
		for _, r := range runs {
			if r.Kind != qcow2.Compressed && r.Off < last {
				return nil, fmt.Errorf("run at %d follows one that ends at %d", r.Off, last)
			}
			last = r.Off + r.Len
			to := disk[r.Off:last]
			switch r.Kind {
			case qcow2.Zero:
				clear(to)
			case qcow2.Data:
				copy(to, file[r.Host:])
			case qcow2.Compressed:
				var from *virtnbd.Restart
				for n := int64(0); n*virtnbd.PieceSize < r.Len; n++ {
					piece, err := d.Piece(s, r, n, from)
					if err != nil {
						return nil, err
					}
					copy(to[n*virtnbd.PieceSize:], piece.Data)
					from = piece.Restart()
				}
			}
		}
	}
	return disk, nil
}

// content is len bytes that can be compressed, in part by what is more than a block ago.
func content(rnd *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += 64 {
		if i > 100<<10 && rnd.IntN(4) > 0 {
			copy(b[i:], b[i-64*(1+rnd.IntN(1000)):][:64])
			continue
		}
		for j := i; j < min(i+64, n); j++ {
			b[j] = byte(rnd.UintN(4))
		}
	}
	return b
}

// Streams of every kind are read as a simple reader reads them.
func TestStreams(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	rnd := rand.New(rand.NewPCG(1, 2))
	big := []streamtest.Frame{{Off: 0, Data: content(rnd, mib+mib/4+512)}, {Off: 65 * mib, Data: content(rnd, 100<<10)}}
	var many []streamtest.Frame
	for i := range int64(3000) {
		many = append(many, streamtest.Frame{Off: i * 22 << 10, Data: content(rnd, 512*(1+rnd.IntN(3)))})
	}
	const parent = "virtnbdbackup.0"
	for _, c := range []struct {
		frames []streamtest.Frame
		kinds  []streamtest.Stream
	}{
		{nil, []streamtest.Stream{{}, {Parent: parent, Compress: true}}},
		{big, []streamtest.Stream{{}, {Compress: true}, {Compress: true, Indep: true}, {Compress: true, Limit: mib / 2}}},
		{many, []streamtest.Stream{{Parent: parent}, {Compress: true, Parent: parent, Limit: 1024}}},
	} {
		for _, s := range c.kinds {
			s.Size, s.Frames = 66*mib-1536, c.frames
			if s.Parent != "" && len(c.frames) > 0 {
				s.Frames = append([]streamtest.Frame(nil), c.frames...)
				s.Frames[1] = streamtest.Frame{Off: s.Frames[1].Off, Len: 4096}
			}
			name := fmt.Sprintf("%d frames, parent %q, compressed %v, limit %d, %v", len(c.frames), s.Parent, s.Compress, s.Limit, s.Indep)
			file := s.Bytes()
			var parent []byte
			if s.Parent != "" {
				parent = bytes.Repeat([]byte{0xee}, int(s.Size)+4096)
			}
			want, err := streamtest.Apply(parent, file)
			if err != nil {
				t.Fatal(err)
			}
			got, err := read(parent, file)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			} else if !bytes.Equal(got, want) {
				t.Errorf("%s: other content", name)
			}
		}
	}
}

func realStreams(t testing.TB, match string) []string {
	t.Helper()
	files, err := filepath.Glob(foreigntest.Unpack(t, "virtnbdbackup") + "/virtnbdbackup/" + match)
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	return files
}

// So are those that virtnbdbackup has written.
func TestRealStreams(t *testing.T) {
	t.Parallel()
	for _, path := range slices.Concat(realStreams(t, "v[13]-compress/*.data"), realStreams(t, "v3-bigframe/*.inc.*.data")) {
		file, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		want, err := streamtest.Apply(nil, file)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		got, err := read(nil, file)
		if err != nil {
			t.Errorf("%s: %v", path, err)
		} else if !bytes.Equal(got, want) {
			t.Errorf("%s: other content", path)
		}
	}
}

// What a killed run leaves is no stream.
func TestPartial(t *testing.T) {
	t.Parallel()
	for _, path := range realStreams(t, "v3-odd/*.partial") {
		file, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := read(nil, file); !errors.Is(err, virtnbd.ErrCorrupt) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func small(compress bool) streamtest.Stream {
	rnd := rand.New(rand.NewPCG(3, 4))
	return streamtest.Stream{
		Size: 1 << 20, Compress: compress, Limit: 128 << 10,
		Frames: []streamtest.Frame{{Off: 4096, Data: content(rnd, 300<<10)}, {Off: 1<<20 - 512, Data: content(rnd, 512)}},
	}
}

// No file that was cut off is taken for a whole one, however short it is.
func TestCutOff(t *testing.T) {
	t.Parallel()
	for _, compress := range []bool{false, true} {
		file := small(compress).Bytes()
		for n := 0; n < len(file); n += 1 + n/500 {
			_, err := virtnbd.Open(bytes.NewReader(file[:n]), int64(n))
			if !errors.Is(err, virtnbd.ErrCorrupt) && !errors.Is(err, virtnbd.ErrNotStream) {
				t.Fatalf("compressed %v, cut to %d of %d bytes: %v", compress, n, len(file), err)
			}
		}
		for _, more := range []string{"x", "\r\n", "stop 0000000000000000 0000000000000000\r\n"} {
			long := append(bytes.Clone(file), more...)
			if _, err := virtnbd.Open(bytes.NewReader(long), int64(len(long))); !errors.Is(err, virtnbd.ErrCorrupt) {
				t.Errorf("compressed %v, with %q behind it: %v", compress, more, err)
			}
		}
	}
}

// A compressed stream shows every change of its data: blocks have check sums. Only that
// of all blocks together is not looked at, as it takes reading them all.
func TestFlipped(t *testing.T) {
	t.Parallel()
	file := small(true).Bytes()
	want, err := read(nil, file)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(5, 6))
	data := bytes.Index(file, []byte("data 0"))
	for range 300 {
		broken := bytes.Clone(file)
		at := data + rnd.IntN(len(file)-data)
		broken[at] ^= 1 << rnd.IntN(8)
		got, err := read(nil, broken)
		if err == nil && !bytes.Equal(got, want) {
			t.Fatalf("byte %d changed unnoticed", at)
		}
	}
}

// What a stream must not say.
func TestRefused(t *testing.T) {
	t.Parallel()
	header := func(kind string, off, length int64) string {
		return fmt.Sprintf("%s %016x %016x\r\n", kind, off, length)
	}
	sector := strings.Repeat("x", 512)
	stop := header("stop", 0, 0)
	with := func(meta string, rest ...string) []byte {
		return []byte(header("meta", 0, int64(len(meta))) + meta + "\r\n" + strings.Join(rest, ""))
	}
	meta := func(data int, more string) string {
		return fmt.Sprintf(`{"virtualSize": 4096, "dataSize": %d, "date": "2026-11-20T11:17:13", "diskName": "vda", "compressed": false,
			"streamVersion": 2, "incremental": true, "parentCheckpoint": "x"%s}`, data, more)
	}
	for name, c := range map[string]struct {
		file []byte
		err  error
	}{
		"nothing":             {nil, virtnbd.ErrNotStream},
		"another kind first":  {[]byte(header("data", 0, 4096)), virtnbd.ErrNotStream},
		"too much metadata":   {[]byte(header("meta", 0, 1<<40)), virtnbd.ErrCorrupt},
		"no JSON":             {with("{", stop), virtnbd.ErrCorrupt},
		"metadata at 1":       {[]byte(header("meta", 1, 0)), virtnbd.ErrCorrupt},
		"no version":          {with(strings.Replace(meta(0, ""), "streamVersion", "x", 1), stop), virtnbd.ErrUnsupported},
		"version 3":           {with(meta(0, `, "streamVersion": 3`), stop), virtnbd.ErrUnsupported},
		"no size":             {with(meta(0, `, "virtualSize": 0`), stop), virtnbd.ErrCorrupt},
		"negative":            {with(meta(0, `, "virtualSize": -1`), stop), virtnbd.ErrCorrupt},
		"huge":                {with(meta(0, `, "virtualSize": 9223372036854775807`), stop), virtnbd.ErrCorrupt},
		"a fraction":          {with(meta(0, `, "virtualSize": 1e3.5`), stop), virtnbd.ErrCorrupt},
		"more data than disk": {with(meta(8192, ""), stop), virtnbd.ErrCorrupt},
		"no date":             {with(meta(0, `, "date": "today"`), stop), virtnbd.ErrCorrupt},
		"other compression":   {with(meta(0, `, "compressed": 1, "compressionMethod": "zip"`), stop), virtnbd.ErrUnsupported},
		"odd compression":     {with(meta(0, `, "compressed": []`), stop), virtnbd.ErrCorrupt},
		"wrong sum of data":   {with(meta(1, ""), header("data", 0, 512), sector, "\r\n", stop), virtnbd.ErrCorrupt},
		"outside of the disk": {with(meta(512, ""), header("data", 4096, 512), sector, "\r\n", stop), virtnbd.ErrCorrupt},
		"beyond its end":      {with(meta(512, ""), header("zero", 512, 4096), stop), virtnbd.ErrCorrupt},
		"overflow":            {with(meta(0, ""), header("zero", 512, 1<<63-1), stop), virtnbd.ErrCorrupt},
		"no length":           {with(meta(0, ""), header("zero", 0, 0), stop), virtnbd.ErrCorrupt},
		"not at a sector":     {with(meta(0, ""), header("zero", 100, 512), stop), virtnbd.ErrCorrupt},
		"backwards":           {with(meta(0, ""), header("zero", 1024, 512), header("zero", 0, 512), stop), virtnbd.ErrCorrupt},
		"twice":               {with(meta(0, ""), header("zero", 0, 512), header("zero", 0, 512), stop), virtnbd.ErrCorrupt},
		"a full with a gap":   {with(meta(0, `, "incremental": false`), header("zero", 0, 512), header("zero", 1024, 3072), stop), virtnbd.ErrCorrupt},
		"a full that ends":    {with(meta(0, `, "incremental": false`), header("zero", 0, 512), stop), virtnbd.ErrCorrupt},
		"a stop that is none": {with(meta(0, ""), header("stop", 1, 0)), virtnbd.ErrCorrupt},
		"metadata again":      {with(meta(0, ""), header("meta", 0, 2), "{}\r\n", stop), virtnbd.ErrCorrupt},
		"upper case":          {with(meta(0, ""), strings.ToUpper(header("zero", 0xa00, 512)), stop), virtnbd.ErrCorrupt},
		"longer than said":    {with(meta(512, ""), header("data", 0, 512), sector, "y\r\n", stop), virtnbd.ErrCorrupt},
	} {
		if _, err := virtnbd.Open(bytes.NewReader(c.file), int64(len(c.file))); !errors.Is(err, c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The list of sizes that ends a compressed stream is checked against what it is of.
func TestTrailer(t *testing.T) {
	t.Parallel()
	file := small(true).Bytes()
	at := bytes.LastIndexByte(file, '[') // of the sizes of the first frame's packs
	at = bytes.LastIndexByte(file[:at], '[')
	body, list := file[:at], string(file[at:bytes.LastIndex(file, []byte("\r\ncomp"))])
	with := func(list string) []byte {
		return append(bytes.Clone(body), fmt.Sprintf("%s\r\ncomp %016x %016x\r\n", list, 0, len(list))...)
	}
	if _, err := read(nil, with(list)); err != nil {
		t.Fatal(err)
	}
	var inner string
	if i := strings.Index(list, "{"); i >= 0 {
		inner = list[i : strings.Index(list, "}")+1]
	}
	if inner == "" {
		t.Fatal(list)
	}
	for name, broken := range map[string]string{
		"none":              "[]",
		"no array":          "{}",
		"cut off":           list[:len(list)-1],
		"one too few":       "[" + inner + "]",
		"one too many":      strings.Replace(list, "]}", "]}, 1", 1),
		"another one":       list[:len(list)-1] + ", 0]",
		"a wrong sum":       strings.Replace(list, `{"`, `{"1`, 1),
		"a word":            `["x", 1]`,
		"nothing in a list": strings.Replace(list, inner, `{"0": []}`, 1),
		"a negative size":   "[-1, 1]",
		"a fraction":        "[1.5, 1]",
		"too large":         "[9223372036854775807, 1]",
		"overflow":          `[{"1": [9223372036854775807, 9223372036854775807]}, 1]`,
		"two keys":          strings.Replace(list, "]}", `], "1": [1]}`, 1),
	} {
		if _, err := read(nil, with(broken)); !errors.Is(err, virtnbd.ErrCorrupt) {
			t.Errorf("%s: %s: %v", name, broken, err)
		}
	}
	// A stream without data has an empty list, or none.
	empty := streamtest.Stream{Size: 1 << 20, Compress: true}.Bytes()
	cut := empty[:bytes.LastIndex(empty, []byte("[]"))]
	for _, file := range [][]byte{empty, cut} {
		if _, err := read(nil, file); err != nil {
			t.Error(err)
		}
	}
}

// Packs that are not what the library writes.
func TestPacks(t *testing.T) {
	t.Parallel()
	data := content(rand.New(rand.NewPCG(7, 8)), 200<<10)
	good := streamtest.Pack(data, true)
	for name, c := range map[string]struct {
		change func(b []byte) []byte
		err    error
	}{
		"as it is":         {func(b []byte) []byte { return b }, nil},
		"another magic":    {func(b []byte) []byte { b[0]++; return b }, virtnbd.ErrCorrupt},
		"header's sum":     {func(b []byte) []byte { b[14]++; return b }, virtnbd.ErrCorrupt},
		"another size":     {func(b []byte) []byte { b[6]++; return b }, virtnbd.ErrCorrupt},
		"a dictionary":     {func(b []byte) []byte { b[4] |= 1; return b }, virtnbd.ErrUnsupported},
		"4 MiB blocks":     {func(b []byte) []byte { b[5] = 0x70; return b }, virtnbd.ErrUnsupported},
		"reserved":         {func(b []byte) []byte { b[5] |= 1; return b }, virtnbd.ErrCorrupt},
		"a huge block":     {func(b []byte) []byte { binary.LittleEndian.PutUint32(b[15:], 1<<30); return b }, virtnbd.ErrCorrupt},
		"no block":         {func(b []byte) []byte { binary.LittleEndian.PutUint32(b[15:], 0); return b }, virtnbd.ErrCorrupt},
		"no end":           {func(b []byte) []byte { b[len(b)-8] = 1; return b }, virtnbd.ErrCorrupt},
		"more behind it":   {func(b []byte) []byte { return append(b, 0) }, virtnbd.ErrCorrupt},
		"shorter":          {func(b []byte) []byte { return b[:len(b)-5] }, virtnbd.ErrCorrupt},
		"cut in its head":  {func(b []byte) []byte { return b[:10] }, virtnbd.ErrCorrupt},
		"nothing":          {func(b []byte) []byte { return nil }, virtnbd.ErrCorrupt},
		"block's data":     {func(b []byte) []byte { b[30]++; return b }, virtnbd.ErrCorrupt},
		"another block":    {func(b []byte) []byte { return append(b[:15:15], streamtest.Pack(data[:1000], true)[15:]...) }, virtnbd.ErrCorrupt},
		"of another frame": {func([]byte) []byte { return streamtest.Pack(data[:199<<10], true) }, virtnbd.ErrCorrupt},
	} {
		pack := c.change(bytes.Clone(good))
		s := streamtest.Stream{Size: 1 << 20, Parent: "x", Frames: []streamtest.Frame{{Off: 0, Data: data}}}
		file := s.Bytes()
		file = bytes.Replace(file, data, pack, 1)
		file = bytes.Replace(file, []byte(`"compressed": false`), []byte(`"compressed": 12345`), 1)
		list := fmt.Sprintf("[%d]", len(pack))
		file = append(file, fmt.Sprintf("%s\r\ncomp %016x %016x\r\n", list, 0, len(list))...)
		got, err := read(nil, file)
		if !errors.Is(err, c.err) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil && !bytes.Equal(got[:len(data)], data) {
			t.Errorf("%s: other content", name)
		}
	}
}

// FuzzStream reads arbitrary bytes: never a panic, a hang, or memory out of proportion.
// What can be read is what a simple reader reads.
func FuzzStream(f *testing.F) {
	rnd := rand.New(rand.NewPCG(9, 9))
	frames := []streamtest.Frame{{Off: 512, Data: content(rnd, 1024)}, {Off: 8192, Len: 512}, {Off: 65536, Data: content(rnd, 512)}}
	for _, s := range []streamtest.Stream{
		{Frames: frames},
		{Frames: frames, Parent: "x"},
		{Frames: frames, Compress: true},
		{Frames: frames, Compress: true, Limit: 512, Parent: "x"},
		{Compress: true},
	} {
		s.Size = 1 << 20
		f.Add(s.Bytes())
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		if m, err := virtnbd.ReadMeta(bytes.NewReader(file), int64(len(file))); err == nil && m.VirtualSize > 4<<20 {
			// Too large to compare; here it is for the index and the map.
			s, err := virtnbd.Open(bytes.NewReader(file), int64(len(file)))
			for off := int64(0); err == nil && off < min(s.Size(), 1<<32); off += s.Span() {
				_, err = s.Map(off, s.Span(), nil)
			}
			return
		}
		got, err := read(nil, file)
		if err != nil {
			return
		}
		want, err := streamtest.Apply(nil, file)
		if err != nil {
			return // it knows less: blocks that have no check sum, say
		}
		if !bytes.Equal(got, want) {
			t.Error("other content")
		}
	})
}
