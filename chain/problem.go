package chain

// Problem says what is wrong with a point, or with one of its disks.
type Problem struct {
	Point string // its id, or its folder's name where it has none
	Disk  string // "" is all of the point
	Err   error
}
