"""Ways to engines that live elsewhere: in a module of the user's, in a process."""
