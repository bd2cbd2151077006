"""What every command shares: parsers made from options, errors in one line, output folders, tables, plots."""
