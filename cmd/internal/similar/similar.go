// Package similar finds what a user may have meant who has misspelt a name.
package similar

import (
	"slices"
	"strings"
)

// most is how many names are offered: more of them say nothing.
const most = 3

// To returns those of known that a name is close to, the closest, in their order: at most a third of its characters are
// wrong, and one can be of any name. A name that only begins one, or has other capitals, is close to it.
func To(name string, known []string) []string {
	var best []string
	least := max(1, len([]rune(name))/3)
	for _, k := range known {
		d := distance(strings.ToLower(name), strings.ToLower(k))
		if len(name) > 2 && strings.HasPrefix(k, name) {
			d = min(d, 1)
		}
		short := min(len([]rune(name)), len([]rune(k)))
		if d > least || k == name || d > 0 && d >= short { // nothing of it would be right
			continue
		}
		if d < least {
			best, least = nil, d
		}
		if !slices.Contains(best, k) {
			best = append(best, k)
		}
	}
	return best[:min(len(best), most)]
}

// Question asks whether one of known was meant; it is empty where none is close to the name.
func Question(name string, known []string) string {
	found := To(name, known)
	if len(found) == 0 {
		return ""
	}
	return "did you mean " + strings.Join(found, " or ") + "?"
}

// distance is the least number of characters to insert, leave out, replace or swap with the next one, that makes b of a.
func distance(a, b string) int {
	s, t := []rune(a), []rune(b)
	// Rows of the table of distances between beginnings of both: the one being filled, and the two before.
	before, last, row := make([]int, len(t)+1), make([]int, len(t)+1), make([]int, len(t)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(s); i++ {
		before, last, row = last, row, before
		row[0] = i
		for j := 1; j <= len(t); j++ {
			replaced := last[j-1]
			if s[i-1] != t[j-1] {
				replaced++
			}
			row[j] = min(replaced, last[j]+1, row[j-1]+1)
			if i > 1 && j > 1 && s[i-1] == t[j-2] && s[i-2] == t[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
	}
	return row[len(t)]
}
