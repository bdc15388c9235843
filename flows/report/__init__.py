"""One study as one HTML file: tables with the SQL that made them, plots, responses, provenance."""
