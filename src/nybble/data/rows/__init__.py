"""From files and Hub data sets to rows."""
