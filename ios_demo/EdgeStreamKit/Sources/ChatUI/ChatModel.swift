import ChatCore
import EdgeStreamKit
import Foundation
import Observation

/// What the screens show and do: one conversation with one model of the store.
///
/// It owns the session and carries out what the policies of ChatCore decide. It knows the system only by `ChatSystem`.
@MainActor
@Observable
public final class ChatModel {
    public private(set) var state = ChatState()
    public private(set) var models: [ModelStore.Entry] = []
    public private(set) var current: ModelStore.Entry?
    /// Imports and downloads on their way, by name: 0...1.
    public private(set) var arriving: [String: Double] = [:]

    /// For conversations begun from now on.
    public var systemPrompt: String?
    public var answerOptions = AnswerOptions()

    @ObservationIgnored public var budget = MemoryBudget()
    @ObservationIgnored public var lifecycle = LifecyclePolicy()
    /// After an answer, save if the last time is longer ago than this. Going into the background always saves.
    @ObservationIgnored public var autosaveInterval = Duration.seconds(60)
    /// Threads of the engine; nil: as many as there are cores.
    @ObservationIgnored public var threads: Int?

    @ObservationIgnored private let store: ModelStore
    @ObservationIgnored private let source: any ModelSource
    @ObservationIgnored private let sessions: URL
    @ObservationIgnored private let system: any ChatSystem
    @ObservationIgnored private var session: Session?
    @ObservationIgnored private var loading: Task<Void, Never>?
    @ObservationIgnored private var writing: Task<Void, Never>?
    @ObservationIgnored private var thermal = ThermalPolicy()
    @ObservationIgnored private var resting: [CheckedContinuation<Void, Never>] = []
    @ObservationIgnored private var lastSave = ContinuousClock.now
    @ObservationIgnored private let clock = ContinuousClock()

    /// Files go into `folder`: models, and a session per model.
    public init(folder: URL, system: any ChatSystem, source: any ModelSource) throws {
        store = try ModelStore(folder: folder.appendingPathComponent("models")) { try await sha256(of: $0) }
        sessions = folder.appendingPathComponent("sessions")
        try FileManager.default.createDirectory(at: sessions, withIntermediateDirectories: true)
        self.system = system
        self.source = source
        thermal.update(system.thermalLevel)
        refreshModels()
    }

    /// Heeds the system for as long as the task lives.
    public func run() async {
        for await event in system.events() {
            await handle(event)
        }
    }

    //
    // models
    //

    public func refreshModels() {
        do {
            models = try store.entries()
        } catch {
            fail(error)
        }
    }

    /// Imports a GGUF file or a folder of `edge-stream export-ios`.
    public func add(_ url: URL) async {
        await arrive(url.lastPathComponent) { progress in
            try await self.store.add(url, onProgress: progress)
        }
    }

    public func files(of repository: HubRepository) async throws -> [HubRepository.File] {
        try await source.files(of: repository)
    }

    public func download(_ file: HubRepository.File) async {
        await arrive(file.manifest.name) { progress in
            let arrived = try await self.source.download(file, onProgress: progress)
            defer { try? FileManager.default.removeItem(at: arrived) }
            return try await self.store.add(arrived, expected: file.manifest, move: true)
        }
    }

    private func arrive(
        _ name: String, _ work: (_ progress: @escaping @Sendable (Double) -> Void) async throws -> ModelStore.Entry
    ) async {
        guard arriving[name] == nil else { return }
        arriving[name] = 0
        do {
            _ = try await work { share in
                Task { @MainActor in
                    if self.arriving[name] != nil { self.arriving[name] = share }
                }
            }
        } catch {
            fail(error)
        }
        arriving[name] = nil
        refreshModels()
    }

    public func remove(_ entry: ModelStore.Entry) async {
        if entry == current {
            await perform([.settle, .release], because: .background)  // its conversation goes with it
            current = nil
            state.apply(.closed)
        }
        do {
            try store.remove(entry)
            let file = sessionFile(entry)
            if FileManager.default.fileExists(atPath: file.path) {
                try FileManager.default.removeItem(at: file)
            }
        } catch {
            fail(error)
        }
        refreshModels()
    }

    //
    // life of a session
    //

    /// Loads a model and resumes its conversation. If the open conversation cannot be saved, it stays open instead.
    public func open(_ entry: ModelStore.Entry) async {
        guard await close() else { return }
        current = entry
        await load()
    }

    /// Saves the conversation and releases the model. False, with a notice, if saving failed: everything stays open.
    @discardableResult
    public func close() async -> Bool {
        guard await perform([.settle, .save, .release], because: .background) else { return false }
        current = nil
        state.apply(.closed)
        return true
    }

    private func load() async {
        await startLoading()?.value
    }

    /// Returns when nothing is being loaded or written.
    public func idle() async {
        await loading?.value
        await writing?.value
    }

    private func startLoading() -> Task<Void, Never>? {
        guard let current else { return nil }
        state.apply(.loading(0))
        state.apply(.noticed(nil))
        let task = Task { await self.load(current) }
        loading = task
        return task
    }

    private func load(_ entry: ModelStore.Entry) async {
        do {
            let file = sessionFile(entry)
            let saved = try await usableSession(file)
            guard let options = try await fittingOptions(entry, saved) else { return }
            let model = try await Model.load(entry.file) { done, total in
                Task { @MainActor in
                    if case .loading = self.state.phase { self.state.apply(.loading(Double(done) / Double(total))) }
                }
            }
            let session: Session
            if let saved, saved.belongs(to: model.info) {
                session = try await Session.restore(model, from: file, options: options)
            } else {
                if saved != nil { try setAside(file) }
                session = try await Session.open(model, options: options)
            }
            try Task.checkCancellation()
            self.session = session
            await showTranscript(of: session)
            try await measure()
        } catch {
            if !Task.isCancelled {
                state.apply(.closed)
                fail(error)
            }
        }
    }

    private func showTranscript(of session: Session) async {
        let transcript = await session.transcript()
        let dropped = await session.droppedMessageCount()
        let messages = transcript.map { message -> (ChatState.Message.Role, String) in
            (message.role == .user ? .user : .assistant, message.text)
        }
        state.apply(.opened(transcript: messages, dropped: dropped))
    }

    /// The options of a model's manifest, with the largest cache that fits into memory. Nil, and a notice, if none does.
    private func fittingOptions(_ entry: ModelStore.Entry, _ saved: SavedSession?) async throws -> SessionOptions? {
        var options = SessionOptions(contextSize: entry.manifest.contextSize, systemPrompt: systemPrompt)
        options.threads = threads
        options.sinks = entry.manifest.sinks ?? 4
        options.keyType = try cacheType(entry.manifest.keyType)
        options.valueType = try cacheType(entry.manifest.valueType)
        options.chatTemplate = entry.manifest.chatTemplate
        if let saved {
            options.contextSize = saved.contextSize  // what a restored session will have
        }
        let wanted = try await Model.memoryNeed(of: entry.file, session: options)
        guard case .refused(let short) = budget.judge(need: wanted.peak, available: system.availableMemory) else {
            return options
        }
        // a saved session has the size it has
        for size in sequence(first: wanted.contextSize / 2, next: { $0 / 2 }).prefix(while: { saved == nil && $0 >= 1024 }) {
            options.contextSize = size
            let need = try await Model.memoryNeed(of: entry.file, session: options).peak
            if budget.judge(need: need, available: system.availableMemory) == .fits {
                state.apply(.noticed(.smallerCache(size)))
                return options
            }
        }
        state.apply(.closed)
        let need = ByteCountFormatter.string(fromByteCount: Int64(clamping: wanted.peak), countStyle: .memory)
        let missing = ByteCountFormatter.string(fromByteCount: Int64(clamping: short), countStyle: .memory)
        state.apply(.noticed(.failure("The model needs \(need) of memory: \(missing) more than there is.")))
        return nil
    }

    private func cacheType(_ name: String?) throws -> CacheType {
        guard let name else { return .f16 }
        guard let type = CacheType(rawValue: name) else {
            throw EdgeStreamError(.invalid, "the manifest asks for the cache type \(name), which is unknown")
        }
        return type
    }

    private func sessionFile(_ entry: ModelStore.Entry) -> URL {
        sessions.appendingPathComponent(entry.id + ".session")
    }

    private func usableSession(_ file: URL) async throws -> SavedSession? {
        guard FileManager.default.fileExists(atPath: file.path) else { return nil }
        do {
            return try await Session.peek(file)
        } catch let error where [.format, .version].contains(error.code) {
            try setAside(file)
            return nil
        }
    }

    /// A session that cannot be restored is not ours to delete, nor are those that were set aside before it.
    private func setAside(_ file: URL) throws {
        let names = sequence(first: 1) { $0 + 1 }.lazy.map { file.appendingPathExtension($0 == 1 ? "old" : "old\($0)") }
        let other = names.first { !FileManager.default.fileExists(atPath: $0.path) }!
        try FileManager.default.moveItem(at: file, to: other)
        state.apply(.noticed(.sessionLost(other.lastPathComponent)))
    }

    //
    // talking
    //

    public func send(_ text: String) async {
        let text = text.trimmingCharacters(in: .whitespacesAndNewlines)
        guard !text.isEmpty, state.canSend, await wakeUp(), let session else { return }
        state.apply(.said(text))
        let before = await session.messageCount()
        let stream = session.answer(to: text, options: answerOptions) { done, total in
            Task { @MainActor in self.state.apply(.reading(done: done, total: total)) }
        }
        await write(stream, of: session, messagesBefore: before)
    }

    public func regenerate() async {
        guard state.canRegenerate, let session else { return }
        state.apply(.regenerating)
        await write(session.regenerate(options: answerOptions), of: session, messagesBefore: nil)
    }

    /// Ends the answer that is being written, and returns when nothing is computed any more.
    public func stop() async {
        writing?.cancel()
        letGoOn()
        await writing?.value
    }

    public func clear() async {
        guard let session, let current, !state.isBusy else { return }
        do {
            try await session.clear()
            state.apply(.cleared)
            try await session.save(to: sessionFile(current))
            try await measure()
        } catch {
            fail(error)
        }
    }

    public func dismissNotice() {
        state.apply(.noticed(nil))
    }

    private func wakeUp() async -> Bool {
        if case .suspended = state.phase {
            await load()
        }
        return state.phase == .idle
    }

    private func write(
        _ stream: AsyncThrowingStream<Token, any Error>, of session: Session, messagesBefore: Int?
    ) async {
        let task = Task {
            var failure: (any Error)?
            do {
                try await show(stream)
            } catch {
                failure = error
            }
            do {
                try await session.settle()
            } catch {
                failure = failure ?? error
            }
            let isCut = Task.isCancelled || failure != nil
            if let messagesBefore, await session.messageCount() == messagesBefore {
                state.apply(.tookBack)
            } else {
                state.apply(.ended(isCut: isCut))
            }
            if let failure { fail(failure) }
        }
        writing = task
        await task.value
        if writing == task { writing = nil }
        do {
            try await measure()
            if let current, self.session != nil, clock.now - lastSave >= autosaveInterval {
                try await save(current)
            }
        } catch {
            fail(error)
        }
    }

    private func show(_ stream: AsyncThrowingStream<Token, any Error>) async throws {
        var coalescer = TokenCoalescer()
        defer {
            if let rest = coalescer.finish() { state.apply(.wrote(rest)) }
        }
        var asked = clock.now
        for try await token in stream {
            let now = clock.now
            if let text = coalescer.add(token.text, at: now) {
                state.apply(.wrote(text))
                measure(token)
            }
            if token.finish == nil {
                try await rest(after: now - asked)
            }
            asked = clock.now
        }
    }

    /// Rests as the temperature asks for: a while, or until it has cooled down.
    private func rest(after token: Duration) async throws {
        while !Task.isCancelled {
            if let pause = thermal.rest(after: token) {
                return pause > .zero ? try await system.sleep(for: pause) : ()
            }
            await withCheckedContinuation { resting.append($0) }
        }
    }

    /// Returns once a hot phone has paused the answer that is being written.
    func pausedByHeat() async {
        while resting.isEmpty && writing != nil {
            await Task.yield()
        }
    }

    private func letGoOn() {
        for continuation in resting {
            continuation.resume()
        }
        resting = []
    }

    //
    // the system
    //

    /// What a screen of an app hears from its system; public for apps that hear it elsewhere.
    public func handle(_ event: SystemEvent) async {
        if case .thermal(let level) = event {
            thermal.update(level)
            if thermal.pace != .paused {
                letGoOn()
                if state.notice == .tooHot { dismissNotice() }
            }
            var gauge = state.gauge
            gauge.thermal = level
            state.apply(.measured(gauge))
        }
        let steps = lifecycle.steps(for: event, phase: state.phase, availableMemory: system.availableMemory)
        if !steps.isEmpty {
            await perform(steps, because: event == .memoryWarning ? .memory : .background)
        }
    }

    /// False, with a notice, if a step failed. The steps after it are left out: what could not be saved is not released.
    @discardableResult
    private func perform(_ steps: [LifecyclePolicy.Step], because reason: ChatState.SuspensionReason) async -> Bool {
        let time = system.beginBackgroundTime()
        defer { system.endBackgroundTime(time) }
        for step in steps {
            do {
                switch step {
                case .settle:
                    await stop()
                case .save:
                    if let current, session != nil { try await save(current) }
                case .release:
                    loading?.cancel()
                    await loading?.value
                    await session?.close()
                    session = nil
                    if current != nil { state.apply(.suspended(reason)) }
                case .resume:
                    _ = startLoading()  // not awaited: the next event may be that it is over again
                case .tell(let notice):
                    state.apply(.noticed(notice))
                }
            } catch let error as EdgeStreamError where error.code == .closed {
                continue  // it was saved and released meanwhile
            } catch {
                fail(error)
                return false
            }
        }
        return true
    }

    private func save(_ entry: ModelStore.Entry) async throws {
        try await session?.save(to: sessionFile(entry))
        lastSave = clock.now
    }

    //
    // gauge and notices
    //

    private func measure(_ token: Token) {
        var gauge = state.gauge
        gauge.seen = token.seen
        gauge.cached = token.cached
        gauge.tokensPerSecond = token.tokensPerSecond
        gauge.footprint = system.footprint
        gauge.thermal = system.thermalLevel
        state.apply(.measured(gauge))
    }

    private func measure() async throws {
        guard let stats = try await session?.stats() else { return }
        var gauge = state.gauge
        gauge.seen = stats.seen
        gauge.cached = stats.cached
        gauge.contextSize = stats.contextSize
        gauge.footprint = system.footprint
        gauge.thermal = system.thermalLevel
        state.apply(.measured(gauge))
    }

    func fail(_ error: any Error) {
        // a session that was closed meanwhile was closed here
        if !(error is CancellationError), (error as? EdgeStreamError)?.code != .closed {
            state.apply(.noticed(.failure((error as? any LocalizedError)?.errorDescription ?? "\(error)")))
        }
    }
}
