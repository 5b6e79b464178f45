package points

import (
	"os"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/cmd/internal/cli"
	"qmchain/internal/durable"
)

// Sources are what shells can offer of a set: guests, points and disks. What is wrong with the set is not for the middle of a
// command line to say.
func Sources() cli.Sources {
	return cli.Sources{
		"guest":       guestOffers,
		"guest|point": guestOffers,
		"point":       pointOffers,
		"id":          idOffers,
		"d":           diskOffers,
		"file-in":     func(l *cli.Line) []cli.Offer { return filesIn(pointOffers(l)) },
	}
}

// guestOffers are the guests; and the points of one, once it is named.
func guestOffers(l *cli.Line) []cli.Offer {
	if strings.Contains(l.Word, "/") {
		return pointOffers(l)
	}
	var offers []cli.Offer
	for _, name := range guests(l.Repo()) {
		offers = append(offers, cli.Offer{Word: name})
	}
	return offers
}

// pointOffers are the points of the guest whose name the word begins with; without one, the guests.
func pointOffers(l *cli.Line) (offers []cli.Offer) {
	guest, _, named := strings.Cut(l.Word, "/")
	if !named {
		var matching []string
		for _, name := range guests(l.Repo()) {
			if strings.HasPrefix(name, guest) {
				matching = append(matching, name)
				offers = append(offers, cli.Offer{Word: name + "/"})
			}
		}
		if len(matching) != 1 {
			return offers
		}
		guest, offers = matching[0], nil
	}
	for _, o := range ids(l.Repo(), guest) {
		offers = append(offers, cli.Offer{Word: guest + "/" + o.Word, Help: o.Help})
	}
	return offers
}

// idOffers are the points of the guest that is named before, without its name.
func idOffers(l *cli.Line) []cli.Offer {
	if len(l.Args) == 0 {
		return nil
	}
	return ids(l.Repo(), l.Args[0])
}

// diskOffers are the disks of the point that is named before, or of a guest's newest point.
func diskOffers(l *cli.Line) []cli.Offer {
	if len(l.Args) == 0 {
		return nil
	}
	ref, _, _ := strings.Cut(l.Args[0], ":") // a point's files
	return Disks(l.Repo(), ref)
}

// Disks are the disks of a point of the set in dir; of a guest, those of its newest.
func Disks(dir, ref string) (offers []cli.Offer) {
	guest, name, named := strings.Cut(ref, "/")
	if !named {
		name = "latest"
	}
	m := manifest(dir, guest, name)
	if m == nil {
		return nil
	}
	for _, d := range m.Disks {
		offers = append(offers, cli.Offer{Word: d.Name, Help: string(d.Level)})
	}
	return offers
}

// filesIn are points of which files are meant.
func filesIn(points []cli.Offer) (offers []cli.Offer) {
	for _, o := range points {
		offers = append(offers, o)
		if !strings.HasSuffix(o.Word, "/") {
			offers = append(offers, cli.Offer{Word: o.Word + ":/", Help: "the files in it"})
		}
	}
	return offers
}

func guests(dir string) []string {
	set, err := source.Open(dir)
	if err != nil {
		return nil
	}
	defer set.Close()
	names, _ := set.Guests()
	return names
}

// ids are the names that points of a guest can be called by, without the guest's. In a repository these are of folders, and
// nothing is read.
func ids(dir, guest string) (offers []cli.Offer) {
	var found []chain.ID
	if r, err := repo.Open(dir, durable.FS{}); err == nil {
		found = folderIDs(r, guest)
	} else if points := foreign(dir, guest); points != nil {
		for _, m := range points.All {
			found = append(found, m.ID)
		}
	}
	if len(found) == 0 {
		return nil
	}
	offers = []cli.Offer{{Word: "latest", Help: "the newest point, " + string(found[len(found)-1])}}
	for _, id := range found {
		offers = append(offers, cli.Offer{Word: string(id), Help: when(id)})
	}
	return offers
}

func folderIDs(r *repo.Repo, guest string) (found []chain.ID) {
	g, err := r.Guest(guest)
	if err != nil {
		return nil
	}
	entries, _ := os.ReadDir(g.Dir) // sorted by name, as ids are by age
	for _, e := range entries {
		if id, err := chain.ParseID(e.Name()); err == nil {
			found = append(found, id)
		}
	}
	return found
}

// when is the time that an id tells, by this host's clock.
func when(id chain.ID) string {
	stamp, _, _ := strings.Cut(string(id), "-")
	t, err := time.Parse("20060102T150405Z", stamp)
	if err != nil {
		return ""
	}
	return t.Local().Format("Mon 2 Jan 2006 15:04")
}

// foreign are the points of others' backups.
func foreign(dir, guest string) *source.Points {
	set, err := source.Open(dir)
	if err != nil {
		return nil
	}
	defer set.Close()
	points, err := Of(set, guest)
	if err != nil {
		return nil
	}
	return points
}

func manifest(dir, guest, name string) *chain.Manifest {
	r, err := repo.Open(dir, durable.FS{})
	if err != nil {
		points := foreign(dir, guest)
		if points == nil {
			return nil
		}
		m, _ := points.All.Resolve(name)
		return m
	}
	g, err := r.Guest(guest)
	if err != nil {
		return nil
	}
	var matching []chain.ID
	for _, id := range folderIDs(r, guest) {
		if name == "latest" || strings.HasPrefix(string(id), name) {
			matching = append(matching, id)
		}
	}
	if len(matching) == 0 || name != "latest" && len(matching) > 1 {
		return nil
	}
	m, _ := g.Point(matching[len(matching)-1])
	return m
}
