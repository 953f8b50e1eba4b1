"""The command line: `iec`. A thin shell over the package, without logic of its own."""
