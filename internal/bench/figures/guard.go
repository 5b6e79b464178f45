package figures

import (
	"fmt"
	"slices"
)

// tolerated is how far a ratio may fall: one part in five.
const tolerated = 0.8

// Fall is a ratio that is not what it was; its figure is that of the run before.
type Fall struct {
	Figure
	Was, Now Spread
	Missing  bool // it was not measured now
}

func (f Fall) String() string {
	if f.Missing {
		return fmt.Sprintf("%s: it was %s, and was not measured now", f.ID(), number(f.Was.Median))
	}
	return fmt.Sprintf("%s: %s (%s to %s), was %s (%s to %s)", f.ID(), number(f.Now.Median), number(f.Now.Min), number(f.Now.Max),
		number(f.Was.Median), number(f.Was.Min), number(f.Was.Max))
}

// Fallen are the ratios that have fallen since the run before by more than a fifth, and have not reached what they were in any round
// now. What has varied by more than a fifth before must be below all of what it was: the same again is no fall. Ratios of cases
// that failed are missing. Times are not looked at.
func Fallen(before, now Run) []Fall {
	var falls []Fall
	for _, was := range before.Figures {
		if was.Peer == "" {
			continue
		}
		fall := Fall{Figure: was, Was: SpreadOf(was.Ratios())}
		i := slices.IndexFunc(now.Figures, func(f Figure) bool { return f.ID() == was.ID() })
		if i < 0 {
			fall.Missing = true
			falls = append(falls, fall)
			continue
		}
		fall.Now = SpreadOf(now.Figures[i].Ratios())
		least := fall.Was.Median
		if fall.Was.Min < tolerated*fall.Was.Median {
			least = fall.Was.Min
		}
		if fall.Now.Median < tolerated*fall.Was.Median && fall.Now.Max < least {
			falls = append(falls, fall)
		}
	}
	return falls
}
