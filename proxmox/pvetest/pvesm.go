package pvetest

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// pvesm is the program of that name, as far as it says where volumes are.
func (n *Node) pvesm(args []string, stdout, stderr io.Writer) (code int) {
	if len(args) != 2 || args[0] != "path" {
		fmt.Fprintln(stderr, "ERROR: unknown command 'pvesm "+strings.Join(args, " ")+"'")
		return 255
	}
	storage, name, named := strings.Cut(args[1], ":")
	if !named {
		fmt.Fprintf(stderr, "unable to parse volume ID '%s'\n", args[1])
		return 255
	}
	if n.storage(storage) == "" {
		fmt.Fprintf(stderr, "storage '%s' does not exist\n", storage)
		return 255
	}
	if n.storage(storage) == "rbd" {
		fmt.Fprintf(stdout, "rbd:pool/%s:conf=/etc/pve/ceph.conf\n", name)
		return 0
	}
	// No look whether it is there: nor does PVE's.
	fmt.Fprintln(stdout, n.layout().volume(args[1]))
	return 0
}

// storage is a storage's type, or "".
func (n *Node) storage(name string) string {
	if name == "local" {
		return "dir"
	}
	text, _ := os.ReadFile(filepath.Join(n.Etc, "storage.cfg")) // none: only local
	for line := range strings.Lines(string(text)) {
		if kind, rest, found := strings.Cut(line, ": "); found && strings.TrimSpace(rest) == name {
			return kind
		}
	}
	return ""
}

// AddStorage adds a storage beside local. Its volumes are files, of the names that the type's volumes have.
func (n *Node) AddStorage(kind, name string) {
	n.tb.Helper()
	f, err := os.OpenFile(filepath.Join(n.Etc, "storage.cfg"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	n.fatal(err)
	_, err = fmt.Fprintf(f, "%s: %s\n\tcontent images\n\n", kind, name)
	n.fatal(err)
	n.fatal(f.Close())
}
