"""Plans for machines that are not here: `efficient-vlm audit aot`."""
