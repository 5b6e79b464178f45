package stream

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"qmchain/chain"
	"qmchain/chain/repo"
)

// maxHave bounds a have, in bytes: some million points.
const maxHave = 256 << 20

// Have tells which points a receiver has, bases among them.
type Have struct {
	Repository string
	points     map[pointKey]string // uuids
	order      []pointKey
}

type pointKey struct {
	guest string
	id    chain.ID
}

type haveFile struct {
	Format     int         `json:"format"`
	Repository string      `json:"repository"`
	Points     []havePoint `json:"points"`
}

type havePoint struct {
	Guest string   `json:"guest"`
	ID    chain.ID `json:"id"`
	UUID  string   `json:"uuid"`
}

// ListHave looks at what a repository has; nil is one that is not made yet. Points that can't be read are not in it, but
// returned as problems.
func ListHave(r *repo.Repo) (*Have, []repo.Problem, error) {
	h := &Have{points: map[pointKey]string{}}
	if r == nil {
		return h, nil, nil
	}
	h.Repository = r.ID
	guests, err := r.Guests()
	if err != nil {
		return nil, nil, err
	}
	var problems []repo.Problem
	for _, name := range guests {
		g, err := r.Guest(name)
		if err != nil {
			return nil, nil, err
		}
		points, bad, err := g.Points()
		if err != nil {
			return nil, nil, err
		}
		problems = append(problems, bad...)
		for _, m := range points {
			h.add(name, m.ID, m.UUID)
		}
	}
	return h, problems, nil
}

func (h *Have) add(guest string, id chain.ID, uuid string) {
	k := pointKey{guest, id}
	if _, ok := h.points[k]; !ok {
		h.order = append(h.order, k)
	}
	h.points[k] = uuid
}

// uuid is that of the receiver's point of that id, "" if it has none. A nil Have has nothing.
func (h *Have) uuid(guest string, id chain.ID) string {
	if h == nil {
		return ""
	}
	return h.points[pointKey{guest, id}]
}

// Write writes the have as JSON.
func (h *Have) Write(w io.Writer) error {
	f := haveFile{Format: formatVersion, Repository: h.Repository, Points: []havePoint{}}
	for _, k := range h.order {
		f.Points = append(f.Points, havePoint{k.guest, k.id, h.points[k]})
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", " ")
	return enc.Encode(f)
}

// ReadHave reads what Write has written.
func ReadHave(r io.Reader) (*Have, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxHave+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxHave {
		return nil, fmt.Errorf("a list of points of more than %d bytes", maxHave)
	}
	if len(text) == 0 {
		return nil, errors.New("an empty file: who made it says why")
	}
	var f haveFile
	if err := json.Unmarshal(text, &f); err != nil {
		return nil, fmt.Errorf("not a list of points: %w", err)
	}
	if f.Format != formatVersion {
		return nil, fmt.Errorf("a list of points of format %d, not %d", f.Format, formatVersion)
	}
	h := &Have{Repository: f.Repository, points: map[pointKey]string{}}
	for _, p := range f.Points {
		_, err := chain.ParseID(string(p.ID))
		if err = errors.Join(err, chain.CheckGuestName(p.Guest)); err != nil {
			return nil, fmt.Errorf("not a list of points: %w", err)
		}
		if p.UUID == "" {
			return nil, fmt.Errorf("not a list of points: %s/%s has no uuid", p.Guest, p.ID)
		}
		h.add(p.Guest, p.ID, p.UUID)
	}
	return h, nil
}
