package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/chain/image/imagetest"
	"qmchain/chain/qcow2"
)

func setIdentity(t testing.TB, path string, data []byte) error {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return qcow2.SetIdentity(f, data)
}

// The identity survives all that QEMU does with an image, and hurts none of it.
func TestIdentity(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"cluster_size=64k", "cluster_size=1k", "cluster_size=2M", "compression_type=zstd,extended_l2=on", "lazy_refcounts=on"} {
		for _, backing := range []bool{false, true} {
			name := options
			if backing {
				name += " with a backing file"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				identityLife(t, options, backing)
			})
		}
	}
}

func identityLife(t *testing.T, options string, backing bool) {
	dir := t.TempDir()
	var more []string
	backingName := ""
	if backing {
		base := filepath.Join(dir, "base.qcow2")
		imagetest.QemuImg(t, "create", "-q", "-f", "qcow2", base, "4M")
		imagetest.QemuIO(t, "qcow2", base, "write -P 9 0 4M")
		backingName = base
		more = []string{"-b", base, "-F", "qcow2"}
	}
	path := create(t, options, 4<<20, more...)
	check := func(when string, identity []byte) {
		t.Helper()
		h := mustOpen(t, load(t, path)).Header()
		if !bytes.Equal(h.Identity(), identity) {
			t.Fatalf("%s: identity %q, want %q", when, h.Identity(), identity)
		}
		if h.BackingFile != backingName || backing && h.BackingFormat != "qcow2" {
			t.Fatalf("%s: backing file %q, format %q", when, h.BackingFile, h.BackingFormat)
		}
		imagetest.QemuImg(t, "check", "-q", "-f", "qcow2", path)
		if out := imagetest.QemuImg(t, "info", "-f", "qcow2", path); backing && !strings.Contains(out, backingName) {
			t.Fatalf("%s: %s", when, out)
		}
	}
	before := imagetest.Content(t, "qcow2", path)
	first, second := []byte("point 20261120T101523Z-3f9c"), bytes.Repeat([]byte("x"), qcow2.MaxIdentity)
	for _, id := range [][]byte{first, second, first[:3], first} {
		if err := setIdentity(t, path, id); err != nil {
			t.Fatal(err)
		}
		check("written", id)
	}
	if !bytes.Equal(imagetest.Content(t, "qcow2", path), before) {
		t.Fatal("the content has changed")
	}
	imagetest.QemuIO(t, "qcow2", path, "write -P 1 1000 100000", "write -z 1M 1M", "flush", "discard 0 65536")
	check("written to", first)
	// These rewrite the header.
	imagetest.QemuImg(t, "bitmap", "--add", "-f", "qcow2", path, "b0")
	check("with a bitmap", first)
	if err := setIdentity(t, path, second); err != nil { // beside the bitmaps extension
		t.Fatal(err)
	}
	if out := imagetest.QemuImg(t, "info", "-f", "qcow2", path); !strings.Contains(out, "b0") {
		t.Fatalf("the bitmap is gone: %s", out)
	}
	imagetest.QemuImg(t, "bitmap", "--remove", "-f", "qcow2", path, "b0")
	check("without the bitmap", second)
	imagetest.QemuImg(t, "resize", "-q", "-f", "qcow2", path, "8M")
	check("resized", second)
	imagetest.QemuImg(t, "amend", "-f", "qcow2", "-o", "lazy_refcounts=off", path)
	check("amended", second)
	if backing {
		moved := filepath.Join(dir, strings.Repeat("long", 50)+".qcow2")
		if err := os.Link(backingName, moved); err != nil {
			t.Fatal(err)
		}
		imagetest.QemuImg(t, "rebase", "-u", "-f", "qcow2", "-b", moved, "-F", "qcow2", path)
		backingName = moved
		check("rebased", second)
	}
}

func TestIdentityRefused(t *testing.T) {
	t.Parallel()
	id := []byte("identity")
	path := create(t, "compat=0.10", 1<<20)
	if err := setIdentity(t, path, id); !errors.Is(err, qcow2.ErrUnsupported) {
		t.Errorf("version 2: %v", err)
	}
	path = create(t, "cluster_size=512", 1<<20, "-u", "-b", strings.Repeat("b", 300), "-F", "qcow2")
	before := load(t, path)
	if err := setIdentity(t, path, make([]byte, qcow2.MaxIdentity)); !errors.Is(err, qcow2.ErrNoRoom) {
		t.Errorf("no room: %v", err)
	}
	if !bytes.Equal(load(t, path), before) {
		t.Error("a refused image has changed")
	}
	path = create(t, "cluster_size=64k", 1<<20)
	for _, data := range [][]byte{nil, make([]byte, qcow2.MaxIdentity+1)} {
		if err := setIdentity(t, path, data); err == nil {
			t.Errorf("identity of %d bytes", len(data))
		}
	}
	if err := os.WriteFile(path, []byte("not an image"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := setIdentity(t, path, id); !errors.Is(err, qcow2.ErrNotQcow2) {
		t.Errorf("no image: %v", err)
	}
}

// The same extension twice is nobody's identity.
func TestIdentityTwice(t *testing.T) {
	t.Parallel()
	path := create(t, "cluster_size=64k", 1<<20)
	if err := setIdentity(t, path, []byte("12345678")); err != nil {
		t.Fatal(err)
	}
	b := load(t, path)
	i := bytes.Index(b, []byte("12345678")) - 8
	copy(b[i+16:], b[i:i+16])
	if _, err := openBytes(b); !errors.Is(err, qcow2.ErrCorrupt) {
		t.Errorf("twice: %v", err)
	}
	// Very many unknown ones are an attack.
	b = load(t, path)
	for n := range uint32(5000) {
		binary.BigEndian.PutUint32(b[i+int(n)*8:], 1000+n)
		binary.BigEndian.PutUint32(b[i+int(n)*8+4:], 0)
	}
	if _, err := openBytes(b); !errors.Is(err, qcow2.ErrCorrupt) {
		t.Errorf("5000 extensions: %v", err)
	}
}
