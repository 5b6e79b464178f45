package chain

import (
	"fmt"
	"strings"
	"time"
)

// ID names a point within its guest: UTC time to the second and four random hex digits, "20261120T101523Z-3f9c".
// Ids of one guest sort in the order in which the points were made, whatever the clock did meanwhile: see NewID.
type ID string

const (
	idTime  = "20060102T150405Z"
	idShape = "00000000T000000Z-xxxx" // 0: a digit; x: a hex digit
)

// NewID returns the id of a point made now after the point prev ("" for none). A clock that went back does not break the
// order: the id's time is then one second after that of prev.
func NewID(now time.Time, prev ID, random uint16) ID {
	t := now.UTC().Truncate(time.Second)
	if prev != "" && !t.After(prev.Time()) {
		t = prev.Time().Add(time.Second)
	}
	return ID(fmt.Sprintf("%s-%04x", t.Format(idTime), random))
}

// ParseID checks that s is a well-formed id.
func ParseID(s string) (ID, error) {
	if !hasIDShape(s) {
		return "", fmt.Errorf("%q is not a point's id (they look like 20261120T101523Z-3f9c)", s)
	}
	if _, err := time.Parse(idTime, s[:len(idTime)]); err != nil {
		return "", fmt.Errorf("%q is not a point's id: no such time", s)
	}
	return ID(s), nil
}

// Not a regular expression, here and below: these are asked for each name in a folder, and several times for each manifest.
func hasIDShape(s string) bool {
	if len(s) != len(idShape) {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; idShape[i] {
		case '0':
			if !isDigit(c) {
				return false
			}
		case 'x':
			if !isDigit(c) && (c < 'a' || c > 'f') {
				return false
			}
		default:
			if c != idShape[i] {
				return false
			}
		}
	}
	return true
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// Time is the time in the id. It orders points; the true time of a point stands in its manifest.
func (id ID) Time() time.Time {
	s := string(id)
	if len(s) < len(idTime) {
		return time.Time{}
	}
	t, _ := time.Parse(idTime, s[:len(idTime)])
	return t
}

// CheckGuestName says what is wrong with a guest's name. Names of digits alone are VMIDs of Proxmox VE.
func CheckGuestName(name string) error {
	if !isName(name) {
		return fmt.Errorf("%q can't be a guest's name: letters, digits, '.', '_' and '-', at most 64, the first a letter or digit", name)
	}
	digits := strings.Trim(name, "0123456789") == ""
	if digits && (name[0] == '0' || len(name) > maxVMIDDigits) {
		return fmt.Errorf("%q can't be a guest's name: a name of digits alone is a VMID (1 to 999999999)", name)
	}
	return nil
}

// CheckDiskName says what is wrong with a disk's name.
func CheckDiskName(name string) error {
	if !isName(name) {
		return fmt.Errorf("%q can't be a disk's name: letters, digits, '.', '_' and '-', at most 64, the first a letter or digit", name)
	}
	return nil
}

const (
	maxName       = 64
	maxVMIDDigits = 9
)

func isName(s string) bool {
	if s == "" || len(s) > maxName || strings.IndexByte("._-", s[0]) >= 0 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && !isDigit(c) && strings.IndexByte("._-", c) < 0 {
			return false
		}
	}
	return true
}

// Ref is how a user names one point: GUEST/latest, GUEST/ID or GUEST/PREFIX-OF-AN-ID.
type Ref struct {
	Guest string
	Point string // "latest", an id, or a prefix of one
}

// ParseRef reads a Ref.
func ParseRef(s string) (Ref, error) {
	guest, point, ok := strings.Cut(s, "/")
	if !ok || point == "" {
		return Ref{}, fmt.Errorf("%q does not name a point: use GUEST/latest, GUEST/ID or GUEST/ and the beginning of an id", s)
	}
	if err := CheckGuestName(guest); err != nil {
		return Ref{}, err
	}
	return Ref{Guest: guest, Point: point}, nil
}
