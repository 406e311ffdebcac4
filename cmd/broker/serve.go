package main

import "github.com/spf13/cobra"

func newServe() *cobra.Command { return &cobra.Command{Use: "serve"} }
func newCheck() *cobra.Command { return &cobra.Command{Use: "check"} }
