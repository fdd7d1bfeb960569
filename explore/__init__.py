"""Look inside a trained model: features of its images, similar images, and the patches that excite its filters."""
