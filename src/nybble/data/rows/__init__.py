"""Files and Hub data sets to rows."""
