package tree

import "io/fs"

// View changes who may read what is shown, as the mount options uid, gid and umask ask for. The zero value shows the set's
// own owners and modes.
//
// An owner or group that is given is that of everything, and has the rights that the set's files give to theirs. It adds
// none for a group or for others: in a repository, whose files are 0600, a gid is of use only with an umask.
//
// An umask is an order, as it is for other file systems: what it leaves of 0555 (folders) and 0444 (files) are the modes,
// whatever those of the set's files are. So 0077 is for the owner alone, 0027 also for the group.
type View struct {
	UID, GID *uint32
	Umask    *fs.FileMode
}

// Perm is who may read a node of that kind whose own Perm is p.
func (v View) Perm(kind Kind, p Perm) Perm {
	if v.UID != nil {
		p.UID = *v.UID
	}
	if v.GID != nil {
		p.GID = *v.GID
	}
	if v.Umask != nil && kind != Link { // a link has no rights of its own
		p.Mode = filePerm(Perm{Mode: 0o777}).Mode
		if kind == Dir {
			p.Mode = dirPerm(Perm{Mode: 0o777}).Mode
		}
		p.Mode &^= *v.Umask
	}
	return p
}
