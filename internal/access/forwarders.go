package access

// Forwarders are the proxies that are believed about who is behind them. A nil
// one believes nobody.
type Forwarders struct{}
