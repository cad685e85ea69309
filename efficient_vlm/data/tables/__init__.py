"""Tables of rows on the disk, with random access; `base.Table` says what each of them is."""
