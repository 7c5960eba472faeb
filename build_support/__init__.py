"""What setup.py knows of the machine: the op libraries to build, for which processors, and for how long."""
