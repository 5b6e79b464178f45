package vmrestore

import (
	"maps"
	"regexp"
	"slices"
	"strings"

	"qmchain/proxmox"
)

// unfinished is a new VM's description until it is whole.
const unfinished = "qmchain-restore makes this VM."

// Unfinished tells whether a VM is one that a restore has begun.
func Unfinished(host proxmox.Host, vmid proxmox.VMID) bool {
	c, err := host.Config(vmid)
	return err == nil && c.Lock() == "create" && c.Description == unfinished
}

// AllDisks is what progress is told of where the drives are copied together.
const AllDisks = "all disks"

// Step is one thing that is done, in its turn.
type Step struct {
	Args  []string // of qm; nil: the file with the firewall's rules is written
	Drive string   // whose data it copies; "" if none
	// Whole: the VM is what it should be, and stays even if this fails.
	Whole bool
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_%+,./:@=-]+$`)

// String is the step as a line for a shell.
func (s Step) String() string {
	if s.Args == nil {
		return "# the firewall's rules are written"
	}
	words := []string{"qm"}
	for _, w := range s.Args {
		if !plainWord.MatchString(w) {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		words = append(words, w)
	}
	return strings.Join(words, " ")
}

// flags are options as arguments.
func flags(options proxmox.Options) []string {
	var args []string
	for _, key := range slices.Sorted(maps.Keys(options)) {
		args = append(args, "--"+key, options[key])
	}
	return args
}

// Steps are all that is done. Where a VM is replaced, the names of the new volumes are not known before: of shows them.
func (p *Plan) Steps(of func(drive string) string) []Step {
	switch {
	case p.old != nil:
		return p.replaceSteps(of)
	case p.Live:
		return p.liveSteps()
	}
	id := p.VMID.String()
	create := append([]string{"create", id, "--lock", "create"}, flags(p.Options)...)
	create = append(create, "--description", unfinished)
	steps := []Step{{Args: create}}
	for _, d := range p.Drives {
		s := Step{Args: []string{"set", id, "--skiplock", "1", "--" + d.ID, d.value()}}
		if d.File != "" {
			s.Drive = d.ID
		}
		steps = append(steps, s)
	}
	if p.Firewall != nil {
		steps = append(steps, Step{})
	}
	last, drop := flags(p.last), slices.Clone(p.drop)
	if p.Description != "" {
		last = append(last, "--description", p.Description)
	} else {
		drop = append(drop, "description")
	}
	steps = append(steps, Step{Args: slices.Concat([]string{"set", id, "--skiplock", "1"}, last, deletes(drop))})
	if p.noGenID {
		steps = append(steps, Step{Args: []string{"set", id, "--skiplock", "1", "--vmgenid", "0"}, Whole: true})
	}
	steps = append(steps, Step{Args: []string{"unlock", id}, Whole: true})
	return p.finish(steps)
}

// finish adds what is done with a VM that is whole.
func (p *Plan) finish(steps []Step) []Step {
	if p.template {
		steps = append(steps, Step{Args: []string{"template", p.VMID.String()}, Whole: true})
	}
	if p.Start {
		steps = append(steps, Step{Args: []string{"start", p.VMID.String()}, Whole: true})
	}
	return steps
}

func deletes(keys []string) []string {
	if len(keys) == 0 {
		return nil
	}
	return []string{"--delete", strings.Join(slices.Sorted(slices.Values(keys)), ",")}
}

// liveSteps: one command makes the VM, starts it, and returns when its data is there. What protects a VM from being
// destroyed comes last, as it would be in the way if that fails.
func (p *Plan) liveSteps() []Step {
	id := p.VMID.String()
	create := append([]string{"create", id}, flags(p.Options)...)
	if p.Description != "" {
		create = append(create, "--description", p.Description)
	}
	for _, d := range p.Drives {
		create = append(create, "--"+d.ID, d.value())
	}
	last := maps.Clone(p.last)
	if boot := last["boot"]; boot != "" {
		create = append(create, "--boot", boot)
		delete(last, "boot")
	}
	create = append(create, "--live-restore", "1")
	var steps []Step
	if p.Firewall != nil {
		steps = append(steps, Step{})
	}
	steps = append(steps, Step{Args: create, Drive: AllDisks})
	if len(last) > 0 {
		steps = append(steps, Step{Args: append([]string{"set", id}, flags(last)...), Whole: true})
	}
	return steps
}

// replaceSteps are those for a VM that is there.
func (p *Plan) replaceSteps(of func(drive string) string) []Step {
	id := p.VMID.String()
	var steps []Step
	for _, d := range p.Drives {
		if d.File != "" {
			steps = append(steps, Step{Args: p.importArgs(d), Drive: d.ID})
		}
	}
	steps = append(steps, Step{Args: []string{"set", id, "--lock", "create"}}, Step{Args: append([]string{"set", id, "--skiplock", "1"}, p.exchange(of)...)})
	if p.Firewall != nil {
		steps = append(steps, Step{})
	}
	steps = append(steps, Step{Args: []string{"unlock", id}, Whole: true})
	if old := p.oldVolumes(); len(old) > 0 {
		for i, v := range old {
			old[i] = "<unused of " + v + ">"
		}
		steps = append(steps, Step{Args: []string{"set", id, "--delete", strings.Join(old, ",")}, Whole: true})
	}
	return p.finish(steps)
}

// importArgs has qm copy a drive's data into a volume that the VM does not use yet.
func (p *Plan) importArgs(d Drive) []string {
	args := []string{"disk", "import", p.VMID.String(), d.File, d.Storage}
	if d.Format != "" {
		args = append(args, "--format", d.Format)
	}
	return args
}

// exchange are the changes from the old configuration to the new one; of names the new volumes.
func (p *Plan) exchange(of func(drive string) string) []string {
	want := maps.Clone(p.Options)
	maps.Copy(want, p.last)
	if p.noGenID {
		want["vmgenid"] = "0"
	}
	kept := map[string]bool{}
	for _, d := range p.Drives {
		switch {
		case d.Kept:
			kept[d.ID] = true
		case d.File != "":
			want[d.ID] = of(d.ID) + d.Value
		default:
			want[d.ID] = d.Value
		}
	}
	return changes(p.old.Options, want, p.old.Description, p.Description, kept)
}

// changes are the arguments of `qm set` that make one configuration of another, but for what belongs to a moment.
func changes(from, to proxmox.Options, fromText, toText string, kept map[string]bool) []string {
	set, gone := proxmox.Options{}, []string(nil)
	for key, value := range to {
		if from[key] != value && !moment.MatchString(key) {
			set[key] = value
		}
	}
	for key := range from {
		if _, stays := to[key]; !stays && !moment.MatchString(key) && !kept[key] {
			gone = append(gone, key)
		}
	}
	args := flags(set)
	switch {
	case fromText == toText:
	case toText == "":
		gone = append(gone, "description")
	default:
		args = append(args, "--description", toText)
	}
	return append(args, deletes(gone)...)
}

// oldVolumes are the volumes of a replaced VM that go: those in whose place a restored disk is. Others may be in no backup.
func (p *Plan) oldVolumes() []string {
	var all []string
	for _, d := range p.old.Drives() {
		restored := slices.ContainsFunc(p.Drives, func(n Drive) bool { return n.ID == d.ID && n.File != "" })
		if restored && p.ownVolume(d) {
			all = append(all, d.Volume)
		}
	}
	return all
}

// ownVolume tells whether a drive has a volume that becomes an unused one when the drive goes: one of this VM, by its name,
// which is what PVE goes by too.
func (p *Plan) ownVolume(d proxmox.Drive) bool {
	return !d.CDROM() && !d.CloudInit() && strings.Contains(d.Volume, ":") && strings.Contains(d.Volume, "vm-"+p.VMID.String()+"-")
}
