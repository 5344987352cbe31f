// An assembly file, even an empty one, lets linkname.go declare functions without a body.
