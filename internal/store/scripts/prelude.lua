-- This stands in front of every script. A record is one hash; record.go has its
-- fields. Scripts see it as H, change it with put, write it with commit, and
-- answer with reply. Instants and spans are milliseconds of Redis time, plus
-- ARGV[1], with which tests let time pass. Numbers are whole and below 2^53, and
-- travel as decimal strings: tostring would round them.
local key, nonce = KEYS[1], ARGV[2]
local arg = {}
for i = 3, #ARGV, 2 do arg[ARGV[i]] = ARGV[i + 1] end

-- Read once: time moves on while a script runs.
local time = redis.call('TIME')
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
local now = clock + ARGV[1]

local second, minute, day = 1000, 60000, 86400000
local mostTombstones, mostEnded = 64, 4096
-- settleWindow is how long after a consent was put back nobody may use it:
-- another replica may know a newer one.
local settleWindow = 2 * second

local H, stamp, whole = {}, '', false
local dirty, changed = {}, false

local function int(n) return string.format('%.0f', n) end

local function words(s)
  local w = {}
  for word in string.gmatch(s, '%S+') do w[#w + 1] = word end
  return w
end

local function check()
  if not H.v then
    if redis.call('EXISTS', key) == 1 then error({err = 'TBFOREIGN the hash is not a record'}) end
  elseif H.v ~= '1' then
    error({err = 'TBNEWER the record has layout ' .. H.v})
  end
  stamp = H.c or ''
end

local heads = {'v', 'c', 'k', 'g', 'f', 'd', 'ff', 'rs', 'nc', 'su', 'l', 'r', 'rt', 'p', 'e', 'ec', 'ek', 'et'}

-- load reads the head of the record, and the fields that are named.
local function load(...)
  local names = {unpack(heads)}
  for _, name in ipairs({...}) do names[#names + 1] = name end
  for i, value in ipairs(redis.call('HMGET', key, unpack(names))) do
    H[names[i]] = value or nil
  end
  check()
end

-- loadAll reads the whole record.
local function loadAll()
  local all = redis.call('HGETALL', key)
  for i = 1, #all, 2 do H[all[i]] = all[i + 1] end
  whole = true
  check()
end

local function number(name) return tonumber(H[name] or 0) or 0 end

-- isContent tells what is restored after a loss and has a new stamp when it
-- changes from what is not.
local contents = {p = true, r = true, rt = true, d = true, ff = true, rs = true, e = true, ec = true, ek = true, et = true}
local function isContent(field)
  return contents[field] or string.find(field, '^[satj]:') ~= nil
end

-- isNews tells whether a caller who has told its registers does not have a field:
-- sealed values do not change while their registers stay.
local function isNews(field)
  local holder = field == 'rt' and 'r' or string.gsub(field, '^a:', 's:')
  return holder == field or arg[holder] ~= H[holder]
end

-- mark changes a field, or deletes it if value is nil, without a new stamp.
local function mark(field, value)
  if H[field] ~= value then
    H[field], dirty[field] = value, true
    return true
  end
  return false
end

local function put(field, value)
  if mark(field, value) and isContent(field) then changed = true end
end

local function putMax(field, n)
  if n > number(field) then put(field, int(n)) end
end

-- touch has commit write something, so that WAIT has something to wait for.
local function touch() dirty.v = true end

-- keep has the record kept until t, at the least.
local function keep(t) putMax('k', t) end

-- nextGeneration is above all that the record and the caller know.
local function nextGeneration(floor)
  return math.max(now, number('f'), number('g'), number('d'), tonumber(floor or 0)) + 1
end

-- toInt reads a number that a script has written.
local function toInt(word)
  return tonumber(word) or error({err = 'TBFOREIGN the hash has fields that are not of a record'})
end

-- register reads what a slot holds or held: nil, or a token that is in service
-- ('+') or not any more ('-'). What is not above the last drop is not there.
local function register(value)
  local w = value and words(value)
  if not w then return nil end
  local s = {
    g = toInt(w[1]), id = w[2], state = w[3], obtained = toInt(w[4]), ends = toInt(w[5]),
    life = toInt(w[6]), refused = toInt(w[7]), early = w[8],
  }
  if s.g <= number('d') then return nil end
  return s
end

local function registered(s)
  return table.concat({int(s.g), s.id, s.state, int(s.obtained), int(s.ends), int(s.life), int(s.refused), s.early}, ' ')
end

-- jobOf is the job that a slot is of: what is before the slash. Nil if there is
-- none.
local function jobOf(slot) return string.match(slot, '^([^/]+)/') end

-- ended tells whether the slot's job has ended, or that one token of it.
local function ended(slot)
  local job = jobOf(slot)
  if not job then return false end
  for _, name in ipairs({'j:' .. job, 'j:' .. slot}) do
    local ends = H[name] or not whole and redis.call('HGET', key, name)
    if ends and toInt(ends) > now then return true end
  end
  return false
end

-- token is what a slot has in service, or nil.
local function token(slot)
  local s = register(H['s:' .. slot])
  if s and s.state == '+' and not ended(slot) then return s end
end

local function putSlot(slot, s, sealed)
  put('s:' .. slot, registered(s))
  put('a:' .. slot, sealed)
  keep(s.ends)
end

-- nextRefused counts the predecessors in a row that were reported early, for
-- the token that replaces s.
local function nextRefused(s)
  if s and s.early == '1' then return s.refused + 1 end
  return 0
end

-- grant reads the register of the consent, like register. origin is the id of
-- the grant's first refresh token; ends is 0 if nobody knows; dead is the fence
-- of the last verdict that this refresh token is no longer good, proof the one up
-- to which such verdicts count no more.
local function grant(value)
  local w = value and words(value)
  if not w then return nil end
  local c = {
    g = toInt(w[1]), id = w[2], state = w[3], rotates = w[4], start = toInt(w[5]), ends = toInt(w[6]),
    origin = w[7], dead = toInt(w[8]), proof = toInt(w[9]),
  }
  if c.g <= number('d') then return nil end
  c.lives = c.state == '+' and c.dead <= c.proof and (c.ends == 0 or c.ends > now)
  return c
end

local function granted(c)
  return table.concat({int(c.g), c.id, c.state, c.rotates, int(c.start), int(c.ends), c.origin, int(c.dead), int(c.proof)}, ' ')
end

-- consent is the one in service, dead or alive, or nil.
local function consent()
  local c = grant(H.r)
  if c and c.state == '+' then return c end
end

local function putConsent(c, sealed)
  put('r', granted(c))
  put('rt', sealed)
end

-- settling is how long the consent may not be used yet.
local function settling()
  return math.min(settleWindow, math.max(0, number('su') - now))
end

-- lease is the one that was granted last, or nil. It never lasts longer than its
-- own length from now: Redis time may have gone back.
local function lease()
  if not H.l then return nil end
  local fence, ends, length, owner = string.match(H.l, '^(%S+) (%S+) (%S+) (.*)$')
  local l = {fence = toInt(fence), ends = toInt(ends), length = toInt(length), owner = owner}
  l.ends = math.min(l.ends, now + l.length)
  l.live = l.ends > now
  return l
end

local function putLease(fence, length, owner)
  put('l', table.concat({int(fence), int(now + length), int(length), owner}, ' '))
end

-- isMine tells whether a lease or a presentation is the caller's, live or not.
local function isMine(x)
  return x and x.owner == arg.owner and x.fence == toInt(arg.fence)
end

-- holds tells whether l is the caller's, and no later fence was reserved.
local function holds(l)
  return isMine(l) and l.live and l.fence == number('f')
end

-- presented is what is known of the presentations of a refresh token, or nil: how
-- many are in doubt, when the last began, how often that changed; and of the one
-- under way, or of which nobody has said what came of it: the lease's fence, its
-- horizon, the owner ('-': there is none).
local function presented()
  if not H.p then return nil end
  local id, count, at, turn, fence, ends, owner = string.match(H.p, '^(%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (.*)$')
  return {
    id = id, count = toInt(count), at = toInt(at), turn = toInt(turn),
    fence = toInt(fence), ends = toInt(ends), owner = owner,
  }
end

-- presentations are those of the refresh token with this id.
local function presentations(id)
  local p = presented()
  if p and p.id == id then return p end
  return {id = id, count = 0, at = 0, turn = 0, fence = 0, ends = 0, owner = '-'}
end

local function putPresentations(p)
  put('p', table.concat({
    p.id, int(p.count), int(p.at), int(p.turn + 1), int(p.fence), int(p.ends), p.owner,
  }, ' '))
end

local function failure()
  if not H.e then return nil end
  local w = words(H.e)
  local e = {fence = toInt(w[1]), kind = w[2], count = toInt(w[3]), at = toInt(w[4]), ends = toInt(w[5])}
  e.stands = e.ends == 0 or e.ends > now
  return e
end

local function putFailure(e, code, subject, text)
  put('e', table.concat({int(e.fence), e.kind, int(e.count), int(e.at), int(e.ends)}, ' '))
  put('ec', code)
  put('ek', subject)
  put('et', text)
  keep(math.max(e.at, e.ends))
end

local function takeFailure()
  put('e', nil)
  put('ec', nil)
  put('ek', nil)
  put('et', nil)
end

-- clearFailure forgets the failure, and all that leases up to a fence may still
-- say.
local function clearFailure(fence)
  local e = failure()
  takeFailure()
  putMax('ff', math.max(fence, e and e.fence or 0))
end

-- reset has everybody forget what they remember of failures.
local function reset() put('rs', int(math.max(now, number('rs') + 1))) end

local function tombstoned(id)
  local ends = H['t:' .. id] or redis.call('HGET', key, 't:' .. id)
  return ends and tonumber(ends) > now
end

-- bury remembers until some instant that an id is out of service.
local function bury(id, ends)
  if ends > tonumber(H['t:' .. id] or 0) then put('t:' .. id, int(ends)) end
  keep(ends)
end

-- conclude remembers until some instant that a job, or one token of it, has ended.
local function conclude(what, ends)
  putMax('j:' .. what, ends)
  keep(ends)
end

-- each calls visit(name, value) for all fields of a kind, which end in a name.
local function each(kind, visit)
  local found = {}
  for field, value in pairs(H) do
    if string.sub(field, 1, 2) == kind .. ':' then found[#found + 1] = {string.sub(field, 3), value} end
  end
  for _, f in ipairs(found) do visit(f[1], f[2]) end
end

-- pruneKind deletes the fields of a kind whose instant has come, and those that
-- are to be forgotten first where there are too many.
local function pruneKind(kind, most)
  local left = {}
  each(kind, function(id, ends)
    if toInt(ends) <= now then put(kind .. ':' .. id, nil) else left[#left + 1] = {id, toInt(ends)} end
  end)
  table.sort(left, function(a, b) return a[2] > b[2] or a[2] == b[2] and a[1] > b[1] end)
  for i = most + 1, #left do put(kind .. ':' .. left[i][1], nil) end
end

-- prune deletes what is over, of a record that was loaded as a whole.
local function prune()
  pruneKind('t', mostTombstones)
  pruneKind('j', mostEnded)
  each('s', function(slot, value)
    local s = register(value)
    if not s or slot ~= '' and s.ends + 10 * minute <= now or ended(slot) then
      put('s:' .. slot, nil)
      put('a:' .. slot, nil)
    end
  end)
  if not grant(H.r) then
    put('r', nil)
    put('rt', nil)
  end
  each('w', function(id, value)
    if tonumber(words(value)[2]) <= now then
      put('w:' .. id, nil)
      put('x:' .. id, nil)
    end
  end)
end

-- expire has the record end by itself a day after all that is in it, that of a job
-- two minutes after, but never while it holds what cannot be had again.
local function expire()
  local spare = string.sub(key, 6, 9) == 'job.' and 2 * minute or day
  local e = failure()
  if consent() or H.p or e and e.ends == 0 then
    redis.call('PERSIST', key)
  else
    local l = lease()
    redis.call('PEXPIRE', key, int(math.max(number('k'), now, l and l.ends or 0) + spare - now))
  end
end

-- commit writes all changes, and tells of them if it is given a word for them.
-- Whether they can be told of does not matter to the write.
local function commit(word)
  if next(dirty) == nil then return end
  put('v', '1')
  if changed then mark('c', nonce .. '.' .. int(now)) end
  local sets, dels = {}, {}
  for field in pairs(dirty) do
    if H[field] then
      sets[#sets + 1] = field
      sets[#sets + 1] = H[field]
    else
      dels[#dels + 1] = field
    end
  end
  for i = 1, #sets, 4000 do redis.call('HSET', key, unpack(sets, i, math.min(i + 3999, #sets))) end
  for i = 1, #dels, 4000 do redis.call('HDEL', key, unpack(dels, i, math.min(i + 3999, #dels))) end
  expire()
  if word then
    redis.pcall('PUBLISH', 'tb1:events', word .. ' ' .. nonce .. ' ' .. int(number('g')) .. ' ' .. string.sub(key, 6, -2))
  end
end

-- reply answers with the code, Redis time as a number, what the record's head
-- says, its stamps before and after, the content that was written, and what else
-- the script has to say.
local function reply(code, more)
  local delta, out = {}, {}
  for field in pairs(dirty) do
    if H[field] and isContent(field) then
      delta[#delta + 1] = field
      delta[#delta + 1] = H[field]
    end
  end
  for name, value in pairs(more or {}) do
    if value then
      out[#out + 1] = name
      out[#out + 1] = value
    end
  end
  return {code, clock, int(number('g')), int(number('f')), stamp, H.c or '', delta, out}
end
