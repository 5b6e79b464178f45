package standard

import "context"

// planCommit plans one image of a disk.
func (j *Job) planCommit(ctx context.Context, d *disk) error {
	data, err := dataOf(ctx, d.img)
	if err != nil {
		return err
	}
	name := d.name + ".qcow2"
	j.Plan.Results = append(j.Plan.Results, Result{d.name, d.point.ID, j.out.final(name)})
	return j.exportStep(d.name, name, d.point, d.name, data)
}
