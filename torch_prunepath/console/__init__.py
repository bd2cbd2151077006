"""What every command shares: errors in one line, settings, output folders, tables."""
