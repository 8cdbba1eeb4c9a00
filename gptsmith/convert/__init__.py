"""Every GPT-2 weight in, every ecosystem out: the table of formats, one file for each.

A format is a module with a table of names and up to four verbs:

    recognise(path) -> bool             whether the content (never the name) is of this format
    read(path) -> Stored                what it holds, with one tensor at a time in memory
    nearest(config) -> GPTConfig        the closest model that the format can say
    write(stored, out, dtype) -> None   a file, or into an empty folder, one tensor at a time

Formats do not know one another, nor this table.
"""
