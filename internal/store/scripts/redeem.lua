#!lua flags=allow-oom
-- redeem hands out the content of a ticket to the first owner who asks. It is
-- kept to its end, so that the same owner gets it again.
--
-- arg: owner.
local sealed, kept, ends, owner = unpack(redis.call('HMGET', key, 'sealed', 'kept', 'ends', 'owner'))
if not sealed or toInt(ends) <= now then return reply('UNKNOWN') end
if owner and owner ~= arg.owner then return reply('TAKEN') end
redis.call('HSET', key, 'owner', arg.owner)
return reply('REDEEMED', {sealed = sealed, age = int(math.max(now - toInt(kept), 0))})
