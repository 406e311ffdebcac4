package config

import (
	"cmp"
	"slices"
	"time"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

const defaultLease = 3 * time.Second

// store returns what it takes to reach the store. Profiles that are built after
// it name their credentials by a key of the store's keyset, so that all replicas
// call the same credential the same.
func (l *load) store(message *configv1.Store) *Store {
	redis := message.GetRedis()
	l.checkRedis(redis)
	s := &Store{
		Redis: store.RedisOptions{
			Addresses:  redis.GetAddresses(),
			MasterName: redis.GetMasterName(),
			Cluster:    redis.GetCluster() || len(redis.GetAddresses()) > 1 && redis.GetMasterName() == "",
			Username:   redis.GetUsername(),
			Lease:      cmp.Or(redis.GetLease().AsDuration(), defaultLease),
		},
		Access: store.Access{Password: l.secrets[redis.GetPassword()], Keyset: l.keyset(message.GetEncryptionKeyset())},
	}
	if redis.GetTls() != nil {
		s.Access.TLS = l.redisTLS(redis.GetTls())
	}
	if s.Access.Keyset != nil {
		l.options.FingerprintKey = s.Access.Keyset.FingerprintKey()
	}
	return s
}

func (l *load) checkRedis(message *configv1.Redis) {
	const at = "store.redis.addresses"
	if l.tainted[at] {
		return
	}
	for i, address := range message.GetAddresses() {
		l.checkPort(item(at, i), address)
	}
	if message.GetTls() == nil && slices.ContainsFunc(message.GetAddresses(), isRemote) {
		l.warning(at, "without tls the password, and all that is not sealed, travel in clear: add tls")
	}
}

func isRemote(address string) bool { return !isLoopback(address) }

// keyset returns nil when there are problems.
func (l *load) keyset(reference *configv1.Secret) *store.Keyset {
	const at = "store.encryption_keyset"
	if reference == nil || l.tainted[at] {
		return nil
	}
	keyset, err := store.ParseKeyset(l.secrets[reference])
	if err != nil {
		l.problem(l.nearer(at, "file.env.value"), err.Error())
		return nil
	}
	return keyset
}
