"""Looking at what a run has learnt: features of its images, which of them are alike, and what its filters answer to."""
