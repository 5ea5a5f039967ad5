"""The command line: parse, load, call the verb, save, print. One file per subcommand."""
