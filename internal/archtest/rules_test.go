package archtest

// rules say who may know whom. Folders are relative to the module and stand
// for what lies below them too; the longest one that covers a package counts.
type rules struct {
	// imports lists, for each folder, the folders of the module that it may
	// import. A package without an entry is an error: decide where it belongs.
	imports map[string][]string
	// never are pairs of which the first must not reach the second, not even
	// through others.
	never [][2]string
	// only lists packages, of others or the standard library, that no folder
	// but these may import.
	only map[string][]string
	// testOnly are folders that only tests import, and those in helpers.
	testOnly, helpers []string
	// calls are functions, by package, that only the folders in mayCall call.
	calls   map[string][]string
	mayCall []string
}

const everything = "*"

var project = rules{
	imports: map[string][]string{
		"cmd":     {everything},
		"backup":  {"backup", "qmp", "chain", "internal"},
		"fusefs":  {"fusefs", "chain", "internal"},
		"hooks":   {"hooks", "proxmox", "internal"},
		"proxmox": {"proxmox", "internal"},
		"chain":   {"chain", "internal"},
		"qmp":     {"qmp", "internal"},
		// What is done with a disk's bytes does not ask where they come from.
		"chain/nbd":    {"chain/image"},
		"chain/export": {"chain/image", "chain/nbd", "internal"},
		// A helper that many share knows none of them.
		"internal": {},
		// Those that join several.
		"internal/fleet":     {"internal"},
		"internal/pveguest":  {"backup", "chain", "proxmox", "internal"},
		"internal/vmrestore": {"chain", "proxmox", "internal"},
		"internal/drill":     {"chain", "qmp", "internal"},
		"internal/report":    {"chain"},
		// For tests.
		"internal/ledger": {"chain", "internal"},
		"internal/demo":   {"internal"},
		"internal/bench":  {"internal/bench"},
		// It asks the programs themselves.
		"packaging": {},
	},
	never: [][2]string{
		{"qmp", "chain"},
		{"chain", "qmp"},
		{"qmp", "proxmox"},
		{"proxmox", "qmp"},
		{"chain", "proxmox"},
		{"proxmox", "chain"},
		// Others' backups and our own are read by what knows both.
		{"chain/foreign", "chain/repo"},
		{"chain/repo", "chain/foreign"},
		{"chain/image", "chain/foreign"},
		{"chain/virtnbd", "chain/image"},
		{"chain/repo", "chain/nbd"},
		{"chain/repo", "chain/export"},
		{"chain/source", "chain/nbd"},
		{"chain/source", "chain/export"},
		{"chain/image", "chain/nbd"},
		{"backup", "fusefs"},
		{"fusefs", "backup"},
	},
	only: map[string][]string{
		"github.com/alecthomas/kong":        {"cmd"},
		"github.com/BurntSushi/toml":        {"cmd"},
		"github.com/jotaen/kong-completion": {"cmd"},
	},
	testOnly: []string{
		"internal/testenv", "internal/ledger", "internal/archtest", "internal/demo",
		"qmp/qmptest", "chain/image/imagetest", "chain/repo/repotest", "chain/foreign/foreigntest", "chain/virtnbd/streamtest",
		"proxmox/pvetest", "cmd/internal/jsondoc", "cmd/internal/cli/clitest",
	},
	helpers: []string{"internal/demo"},
	calls: map[string][]string{
		"os":      {"Exit"},
		"syscall": {"Exit"},
		"log":     {"Fatal", "Fatalf", "Fatalln", "Panic", "Panicf", "Panicln"},
		"github.com/sirupsen/logrus": {
			"Exit", "Fatal", "Fatalf", "Fatalln", "Panic", "Panicf", "Panicln",
		},
	},
	mayCall: []string{"cmd", "internal/demo", "internal/bench/run", "packaging/gen"},
}
