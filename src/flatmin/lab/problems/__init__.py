"""What is to be learnt: data sets, networks, experiment files, loading."""
