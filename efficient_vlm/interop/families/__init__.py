"""Published model families: for each a config, a name map, an image processor, a prompt format."""
