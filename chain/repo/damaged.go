package repo

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"qmchain/chain"
)

// Damaged are disks that verify has found damaged and has not found good since, with what it has found: by their own records, and
// by those of the images that they are read through.
type Damaged map[chain.ImageRef]Verified

// Damaged says which disks of a guest's points are known to be damaged. It reads one small file, and nothing of the images. Where
// that can't be read or understood nothing is known; the error is worth a warning.
func (g *Guest) Damaged(points chain.Points) (Damaged, error) {
	c, err := g.Checked()
	if err != nil {
		return nil, err
	}
	return c.Damaged(points), nil
}

// recorded names an image in a record: of points with the same id there is but one.
type recorded struct {
	point chain.ID
	disk  string
}

// Damaged works out which disks of points are damaged. What was found of an image holds for all that is read through it, until the
// point itself, or one between it and the image, is found good by a look that is as thorough.
func (c *Checked) Damaged(points chain.Points) Damaged {
	good, whole, images := map[chain.ID][]Verified{}, map[chain.ID][]Verified{}, map[recorded][]Verified{}
	for _, v := range c.Verified {
		switch {
		case v.Good:
			good[v.Point] = append(good[v.Point], v)
		case len(v.Disks) == 0:
			whole[v.Point] = append(whole[v.Point], v)
		}
		for _, d := range v.Disks {
			if v.Good {
				break
			}
			images[recorded{v.Point, d.Name}] = append(images[recorded{v.Point, d.Name}], v)
			for _, i := range d.Images {
				if at := (recorded{i.Point, i.Disk}); at != (recorded{v.Point, d.Name}) {
					images[at] = append(images[at], v)
				}
			}
		}
	}
	if len(whole)+len(images) == 0 {
		return nil
	}
	known := map[chain.ImageRef]evidence{}
	damaged := Damaged{}
	for _, m := range points { // parents first
		for _, d := range m.Disks {
			var of evidence
			if d.Parent != nil {
				of = known[*d.Parent]
			}
			of.add(whole[m.ID])
			of.add(images[recorded{m.ID, d.Name}])
			of.clear(good[m.ID])
			if v := of.newest(); v != nil {
				known[m.Ref(d.Name)] = of
				damaged[m.Ref(d.Name)] = *v
			}
		}
	}
	return damaged
}

// evidence is the last damage that was found of a disk by looks of each thoroughness.
type evidence [4]*Verified

func (v Verified) thoroughness() (i int) {
	if v.Tables {
		i |= 1
	}
	if v.Deep {
		i |= 2
	}
	return i
}

func (e *evidence) add(found []Verified) {
	for i := range found {
		v := &found[i]
		if at := &e[v.thoroughness()]; *at == nil || !v.Time.Before((*at).Time) {
			*at = v
		}
	}
}

// Clears reports whether a point was found good by v where damage that was found before, as o has it, would have shown. Points of
// one run have the same time.
func (v Verified) Clears(o Verified) bool {
	return v.Good && !v.Time.Before(o.Time) && v.asThorough(o)
}

// clear takes out what has been looked at as thoroughly since, and found good.
func (e *evidence) clear(good []Verified) {
	for _, g := range good {
		for i, v := range e {
			if v != nil && g.Clears(*v) {
				e[i] = nil
			}
		}
	}
}

func (e *evidence) newest() (newest *Verified) {
	for _, v := range e {
		if v != nil && (newest == nil || v.Time.After(newest.Time)) {
			newest = v
		}
	}
	return newest
}

// maxWhy bounds what is repeated of a record, in bytes: a long chain has many images that can be damaged.
const maxWhy = 200

// Err says what was found. It wraps chain.ErrDamaged.
func (v Verified) Err() error {
	return fmt.Errorf("%w: %s", chain.ErrDamaged, v.String())
}

// String says what was found, and when, in this host's time.
func (v Verified) String() string {
	why := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, v.Why)
	why = shortened(why, maxWhy)
	return fmt.Sprintf("verify found on %s, at %s: %s", v.Time.Local().Format(time.DateTime), v.Point, why)
}

// shortened is a text of no more than so many bytes, but for what tells that it was cut.
func shortened(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}
