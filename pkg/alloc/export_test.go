package alloc

// RegisterBody is what a registration's digest is of.
var RegisterBody = RegisterCommand.body
