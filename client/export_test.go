package client

// WaitAfter is the schedule of attempts.
var WaitAfter = waitAfter
