"""Other attentions to measure NSA beside, one file each; a file is imported when its name is asked for."""
