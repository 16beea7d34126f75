"""Everything attached to one model under one name: attaching, switching, merging, saving and loading."""
