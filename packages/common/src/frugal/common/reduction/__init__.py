"""Which image patches and which tokens of a caption the towers never see."""
