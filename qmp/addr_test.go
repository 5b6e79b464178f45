package qmp_test

import (
	"strings"
	"testing"

	"qmchain/qmp"
)

func TestParseAddr(t *testing.T) {
	longest := "/" + strings.Repeat("x", 106)
	tests := []struct{ in, network, address string }{
		{"/var/run/qemu-server/110.qmp", "unix", "/var/run/qemu-server/110.qmp"},
		{"unix:/run/a b.sock", "unix", "/run/a b.sock"},
		{"qmp.sock", "unix", "qmp.sock"},
		{"@qmp", "unix", "./@qmp"}, // a file, no abstract socket
		{"unix:tcp:1", "unix", "tcp:1"},
		{longest, "unix", longest},
		{"tcp:localhost:4444", "tcp", "localhost:4444"},
		{"tcp:[::1]:4444", "tcp", "[::1]:4444"},

		{"", "", ""},
		{"unix:", "", ""},
		{longest + "x", "", ""},
		{"a\x00b", "", ""},
		{"tcp:", "", ""},
		{"tcp:localhost", "", ""},
		{"tcp::4444", "", ""},
		{"tcp:localhost:", "", ""},
		{"tcp:localhost:0", "", ""},
		{"tcp:localhost:65536", "", ""},
		{"tcp:localhost:qmp", "", ""},
		{"tcp:::1:4444", "", ""},
	}
	for _, tt := range tests {
		network, address, err := qmp.ParseAddr(tt.in)
		if network != tt.network || address != tt.address || (err != nil) != (tt.network == "") {
			t.Errorf("ParseAddr(%q) = %q, %q, %v; want %q, %q", tt.in, network, address, err, tt.network, tt.address)
		}
		if _, newErr := qmp.New(tt.in); (newErr != nil) != (err != nil) {
			t.Errorf("New(%q): %v, but ParseAddr: %v", tt.in, newErr, err)
		}
	}
}
