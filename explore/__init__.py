"""Look at what a run has learnt: features of its images, similar images, and what its filters respond to."""
