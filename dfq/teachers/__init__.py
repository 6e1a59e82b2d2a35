"""Teacher loaders: from a name or a file to a float network. One file each."""
